"""Arithmetic that stands in the picture: a line such as 17+25 or 6x7, a column sum, or dots to add up.

Meant for 64 x 32 pixels (32 patches of 8) and 48 x 48 for columns, digits of 12 pixels and more. A problem belongs to
one split by its hash.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import other_numbers

PROMPTS = {
    "en": ("The result?", "Work it out.", "What is the result?"),
    "zh": ("结果是多少？", "算出结果。", "等于多少？"),
}
LINE, COLUMN = (64, 32), (48, 48)
DOT = 6  # pixels
Problem = tuple[int, str, int]
VALUES = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}


def problem(rng: np.random.Generator, split: str, signs: str, most: int) -> Problem:
    """Two numbers up to `most` and a sign between them, with a result of at least 1, of this split."""
    while True:
        sign = scene.choose(rng, signs)
        a, b = (int(v) for v in rng.integers(1, 1 + (9 if sign == "x" else most), 2))
        if VALUES[sign](a, b) >= 1 and read.belongs(f"{a}{sign}{b}", split):
            return a, sign, b


def _paper(
    canvas: tuple[int, int], split: str, rng: np.random.Generator
) -> tuple[Image.Image, ImageDraw.ImageDraw, drawing.RGB]:
    picture = Image.new("RGB", canvas, drawing.background(split, rng))
    ink = drawing.COLOURS[scene.choose(rng, ("black", "blue", "purple", "red"))].shade(split, rng)
    return picture, ImageDraw.Draw(picture), ink


def times(pen: ImageDraw.ImageDraw, x: float, y: float, reach: float, ink: drawing.RGB) -> None:
    """The sign of multiplication: the shipped Latin faces have none."""
    pen.line((x - reach, y - reach, x + reach, y + reach), fill=ink, width=2)
    pen.line((x - reach, y + reach, x + reach, y - reach), fill=ink, width=2)


def line(drawn: Problem, split: str, rng: np.random.Generator) -> Image.Image:
    """a sign b in one line."""
    a, sign, b = drawn
    picture, pen, ink = _paper(LINE, split, rng)
    font = fonts.face(split, "en", rng, int(rng.integers(13, 17)))
    gap = 8
    widths = font.getlength(str(a)), font.getlength(str(b))
    x = rng.uniform(2, max(2.1, LINE[0] - 2 - sum(widths) - 2 * gap))
    y = int(rng.integers(12, LINE[1] - 11))
    pen.text((x, y), str(a), font=font, fill=ink, anchor="lm")
    _sign(pen, sign, x + widths[0] + gap, y, ink)
    pen.text((x + widths[0] + 2 * gap, y), str(b), font=font, fill=ink, anchor="lm")
    return picture


def _sign(pen: ImageDraw.ImageDraw, sign: str, x: float, y: float, ink: drawing.RGB) -> None:
    if sign == "x":
        return times(pen, x, y, 3, ink)
    pen.line((x - 3, y, x + 3, y), fill=ink, width=2)
    if sign == "+":
        pen.line((x, y - 3, x, y + 3), fill=ink, width=2)
    return None


def column(drawn: Problem, split: str, rng: np.random.Generator) -> Image.Image:
    """The second number under the first, a rule below."""
    a, sign, b = drawn
    picture, pen, ink = _paper(COLUMN, split, rng)
    font = fonts.face(split, "en", rng, int(rng.integers(14, 17)))
    right, top = int(rng.integers(32, 45)), int(rng.integers(11, 14))
    pen.text((right, top), str(a), font=font, fill=ink, anchor="rm")
    pen.text((right, top + 17), str(b), font=font, fill=ink, anchor="rm")
    _sign(pen, sign, right - 26, top + 17, ink)
    pen.line((right - 30, top + 27, right + 1, top + 27), fill=ink, width=1)
    return picture


def dots(drawn: Problem, split: str, rng: np.random.Generator) -> Image.Image:
    """Two groups of at most six dots, as on dice, and the sign between them."""
    a, sign, b = drawn
    picture, pen, ink = _paper(LINE, split, rng)
    for count, left in ((a, 3), (b, LINE[0] - 25)):
        for k in range(count):
            x, y = left + (k % 3) * (DOT + 2), 9 + (k // 3) * (DOT + 3)
            pen.ellipse((x, y, x + DOT - 1, y + DOT - 1), fill=ink)
    _sign(pen, sign, LINE[0] / 2, LINE[1] / 2, (20, 20, 20))
    return picture


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    draw, signs, most = scene.choose(rng, ((line, "+-x", 29), (column, "+-", 99), (dots, "+-", 6)))
    drawn = problem(rng, split, signs, most)
    a, sign, b = drawn
    picture = draw(drawn, split, rng)
    return scene.sample("arithmetic", picture, scene.choose(rng, PROMPTS[lang]), str(VALUES[sign](a, b)), lang,
                        "numeric", problem=f"{a}{sign}{b}")  # fmt: skip


def unsolved(sample: Sample) -> list[str]:
    """The problem itself, as read and with its result, and near misses."""
    drawn = sample.meta["problem"]
    return other_numbers(sample) + [drawn, f"{drawn}={sample.answer}", f"={sample.answer}"]


LEVELS = levels.by(lambda s: len(s.meta["problem"]), 5)
TASKS = (Task("arithmetic", boxed(text.number()), unsolved, make=generate, levels=LEVELS),)
