"""Recognising a table: its rows and cells as HTML, cells over two columns included.

Meant for 96 x 64 pixels (96 patches of 8), letters of 10 pixels; up to four rows of two columns or three of three.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import documents, drawing, fonts
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, tables
from glmv_jax.rl.task import Task

CANVAS, LETTERS, STEP = (96, 64), 10, 15
PROMPTS = {
    "en": ("Table Recognition: HTML.", "The table as HTML."),
    "zh": ("表格识别：HTML。", "用HTML写出表格。"),
}
LONGEST = {"en": 5, "zh": 2}
Cell = tuple[str, int]  # text, columns it takes


def cells(rng: np.random.Generator, lang: str) -> list[list[Cell]]:
    """Rows of a table: words at the head and at the left, numbers elsewhere; of three columns the head may join two."""
    words = [word for word in documents.WORDS[lang] if len(word) <= LONGEST[lang]]
    columns = int(rng.integers(2, 4))
    count = int(rng.integers(2, 5 if columns == 2 else 4))
    drawn = iter(scene.distinct(rng, words, count + columns))
    head: list[Cell] = [(next(drawn), 1) for _ in range(columns)]
    if columns == 3 and rng.random() < 0.4:
        head = [head[0], (head[1][0], 2)] if rng.random() < 0.5 else [(head[0][0], 2), head[2]]
    rows = [head]
    for _ in range(count - 1):
        rows.append([(next(drawn), 1)] + [(str(int(rng.integers(1, 100))), 1) for _ in range(columns - 1)])
    return rows


def markup(rows: list[list[Cell]]) -> str:
    """The table in HTML without spaces."""
    span = lambda columns: f' colspan="{columns}"' if columns > 1 else ""  # noqa: E731
    inner = ("".join(f"<td{span(columns)}>{text}</td>" for text, columns in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in inner) + "</table>"


def draw(rows: list[list[Cell]], lang: str, split: str, rng: np.random.Generator) -> Image.Image:
    """The table with ruled lines, its first row tinted half of the time."""
    picture = Image.new("RGB", CANVAS, drawing.background(split, rng))
    pen, font = ImageDraw.Draw(picture), fonts.face(split, lang, rng, LETTERS)
    columns = sum(columns for _, columns in rows[0])
    width = min(44, (CANVAS[0] - 3) // columns)
    left = int(rng.integers(1, CANVAS[0] - width * columns - 1))
    top = int(rng.integers(1, CANVAS[1] - STEP * len(rows) - 1))
    ruled, tint = scene.choose(rng, ((70, 70, 75), (120, 130, 160))), scene.choose(rng, ((214, 226, 246), None))
    for r, row in enumerate(rows):
        x, y = left, top + r * STEP
        for text, span in row:
            box = (x, y, x + span * width, y + STEP)
            pen.rectangle(box, outline=ruled, fill=tint if r == 0 else None)
            middle = (box[0] + box[2]) / 2 + 1, (box[1] + box[3]) / 2
            pen.text(middle, text, font=font, fill=(25, 25, 30), anchor="mm")
            x = box[2]
    return picture


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    while True:
        rows = cells(rng, lang)
        answer = markup(rows)
        if read.belongs(answer, split):
            break
    picture = draw(rows, lang, split, rng)
    return scene.sample("tabular", picture, scene.choose(rng, PROMPTS[lang]), answer, lang, "table")


def ragged(sample: Sample) -> list[str]:
    """All text in one cell, empty cells, no cells, the table again and again, and markup that does not close."""
    gold: Any = tables.parse(sample.answer)
    words = [cell.text for row in gold.children for cell in row.children]
    count = len(gold.children)
    empty = "".join("<tr>" + "<td></td>" * len(row.children) + "</tr>" for row in gold.children)
    return [
        f"<table><tr><td>{' '.join(words)}</td></tr></table>",
        f"<table>{empty}</table>",
        f"<table>{'<tr></tr>' * count}</table>",
        "<table></table>",
        sample.answer + sample.answer,
        f"<table><tr><td>{sample.answer}</td></tr></table>",
        sample.answer.removesuffix("</table>"),
        f"{sample.answer} or {' '.join(words)}",
        "|".join(words),
        "<table>" + "<tr><td>1</td></tr>" * 20 + "</table>",
    ]


TASKS = (Task("tabular", boxed(tables.table()), ragged, make=generate, levels=levels.by_count("<td", 6, 8)),)
