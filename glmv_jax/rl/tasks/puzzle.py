"""Logic puzzles in pictures: a square of four by four numbers, equations of shapes, a row that goes on.

Meant for 64 x 64 pixels (64 patches of 8), digits of 11 pixels and more, shapes of 12. Every puzzle has one answer; in
a square it follows from the row, the column and the block of its cell alone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import choices, other_numbers

CANVAS = (64, 64)
SQUARE = {
    "en": ("1 to 4 once in each row, column and block. What is ?",),
    "zh": ("每行、每列、每块有1到4。？是几？",),
}
EQUATIONS = {"en": ("What is the last ?", "Which number is ?"), "zh": ("最后的？是几？", "？是多少？")}
NEXT = {"en": ("What comes at ?", "Which shape is ?"), "zh": ("？处是什么？", "？是哪个形状？")}


# ------------------------------------------------------------------------------------------------------------- squares
def filled(rng: np.random.Generator) -> np.ndarray:
    """A four by four square with 1 to 4 once in each row, column and two by two block, int [4, 4]."""
    base = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]])
    rows, columns = (np.r_[rng.permutation(2), 2 + rng.permutation(2)] for _ in range(2))
    turned = base[np.ix_(rows, columns)]
    if rng.random() < 0.5:
        turned = turned.T
    return (rng.permutation(4) + 1)[turned - 1]


def seen_from(square: np.ndarray, row: int, column: int) -> set[int]:
    """The numbers (0: hidden) in the row, column and block of a cell."""
    top, left = row // 2 * 2, column // 2 * 2
    around = (*square[row], *square[:, column], *square[top : top + 2, left : left + 2].ravel())
    return {int(v) for v in around} - {0}


def square(split: str, rng: np.random.Generator, lang: str) -> Sample:
    """Some numbers are hidden; what is asked for follows from its row, column and block alone."""
    while True:
        full, hidden = filled(rng), rng.random((4, 4)) < 0.45
        row, column = (int(v) for v in rng.integers(4, size=2))
        hidden[row, column] = True
        shown = np.where(hidden, 0, full)
        if len(seen_from(shown, row, column)) == 3:
            break
    picture = Image.new("RGB", CANVAS, drawing.background(split, rng))
    pen, font = ImageDraw.Draw(picture), fonts.face(split, "en", rng, 11)
    side, edge = 15, 2
    for y, x in np.ndindex(4, 4):
        words = "?" if (y, x) == (row, column) else "" if hidden[y, x] else str(full[y, x])
        ink = (200, 20, 30) if words == "?" else (25, 25, 30)
        pen.text((edge + (x + 0.5) * side + 1, edge + (y + 0.5) * side), words, font=font, fill=ink, anchor="mm")
    for k in range(5):
        at, width = edge + k * side, 1 if k % 2 else 2
        pen.line((edge, at, edge + 4 * side, at), fill=(90, 90, 95), width=width)
        pen.line((at, edge, at, edge + 4 * side), fill=(90, 90, 95), width=width)
    facts = {"choices": ["1", "2", "3", "4"], "puzzle": "square"}
    return scene.sample("puzzle", picture, scene.choose(rng, SQUARE[lang]), str(full[row, column]), lang, "numeric",
                        **facts)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- equations
def stamp(picture: Image.Image, shape: str, rgb: drawing.RGB, x: float, y: float, side: int) -> None:
    """A shape centred on a point."""
    picture.paste(rgb, (round(x - side / 2), round(y - side / 2)), drawing.mask(shape, side))


def equations(split: str, rng: np.random.Generator, lang: str) -> Sample:
    """a + a = 2a; a + b = c; b = ?"""
    a, b = (int(v) for v in rng.integers(1, 10, 2))
    names = scene.distinct(rng, [shape for shape in drawing.SHAPES if shape != "cross"], 2)  # which would be a plus
    shades = [drawing.COLOURS[c].shade(split, rng) for c in scene.distinct(rng, tuple(drawing.COLOURS), 2)]
    picture = Image.new("RGB", CANVAS, drawing.background(split, rng))
    pen, font = ImageDraw.Draw(picture), fonts.face(split, "en", rng, 12)
    rows = (((0, 0), str(2 * a)), (scene.distinct(rng, (0, 1), 2), str(a + b)), ((1,), "?"))
    for r, (parts, value) in enumerate(rows):
        y = 11 + 20 * r
        for k, part in enumerate(parts):
            stamp(picture, names[part], shades[part], 8 + 20 * k + 20 * (len(parts) == 1), y, 13)
        if len(parts) == 2:
            pen.text((18, y), "+", font=font, fill=(25, 25, 30), anchor="mm")
        pen.text((39, y), "=", font=font, fill=(25, 25, 30), anchor="mm")
        pen.text((46, y), value, font=font, fill=(25, 25, 30), anchor="lm")
    return scene.sample("puzzle", picture, scene.choose(rng, EQUATIONS[lang]), str(b), lang, "numeric",
                        puzzle="equations", choices=[str(2 * a), str(a + b), str(a + b + 1)])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- rows
def row(split: str, rng: np.random.Generator, lang: str) -> Sample:
    """A pattern of two or three shapes that repeats over two lines; one of its places is "?"."""
    period = int(rng.integers(2, 4))
    names = scene.distinct(rng, tuple(drawing.SHAPES), period)
    shade = drawing.COLOURS[scene.choose(rng, tuple(drawing.COLOURS))].shade(split, rng)
    canvas = (64, 32)
    picture = Image.new("RGB", canvas, drawing.background(split, rng))
    pen, font = ImageDraw.Draw(picture), fonts.face(split, "en", rng, 13)
    places, asked = 8, int(rng.integers(period, 8))
    for k in range(places):
        x, y = 8 + 16 * (k % 4), 8 + 16 * (k // 4)
        if k == asked:
            pen.text((x, y), "?", font=font, fill=(20, 20, 20), anchor="mm")
        else:
            stamp(picture, names[k % period], shade, x, y, 12)
    name = lambda shape: drawing.SHAPES[shape][lang]  # noqa: E731
    answer = name(names[asked % period])
    facts = {"choices": [name(shape) for shape in names], "puzzle": "row"}
    facts["aliases"] = [answer[:-1]] if lang == "zh" else []
    return scene.sample("puzzle", picture, scene.choose(rng, NEXT[lang]), answer, lang, "exact", **facts)


def generate(rng: np.random.Generator, split: str) -> Sample:
    return scene.choose(rng, (square, equations, row))(split, rng, scene.language(rng))


def guesses(sample: Sample) -> list[str]:
    """All choices, each wrong one, and near misses of a number."""
    return choices(sample) + other_numbers(sample)


LEVELS = levels.by_kind("puzzle", "row", "equations", "square")
TASKS = (Task("puzzle", boxed(text.number()), guesses, make=generate, levels=LEVELS),)
