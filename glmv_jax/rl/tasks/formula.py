"""Recognising a formula: LaTeX of fractions, roots, powers and indices.

Meant for 96 x 48 pixels (72 patches of 8), letters of 12 pixels and more, scripts of 9. The rule unifies spellings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, formulas
from glmv_jax.rl.task import Task

CANVAS, MARGIN = (96, 48), 3
SIZES = (18, 16, 14, 13, 12)  # of letters, pixels; the largest that fits is drawn
SCRIPT, LEAST = 0.7, 9
PROMPTS = {
    "en": ("Formula Recognition: LaTeX.", "The formula in LaTeX."),
    "zh": ("公式识别：LaTeX。", "用LaTeX写出公式。"),
}
LETTERS = "abcdknxyz"
# A formula is a symbol ("x", "12", "+"), or (kind, part, ...) with kind "row", "frac", "sqrt", "^" or "_".
Formula = str | tuple


# ------------------------------------------------------------------------------------------------------------ drawing
def atom(rng: np.random.Generator) -> str:
    return scene.choose(rng, LETTERS) if rng.random() < 0.6 else str(int(rng.integers(2, 10)))


def short(rng: np.random.Generator) -> Formula:
    """A symbol, or a sum of two."""
    if rng.random() < 0.6:
        return atom(rng)
    return ("row", scene.choose(rng, LETTERS), scene.choose(rng, "+-"), atom(rng))


def term(rng: np.random.Generator) -> Formula:
    kind = scene.choose(rng, ("atom", "^", "_", "frac", "sqrt"))
    if kind == "atom":
        return atom(rng)
    if kind == "frac":
        return ("frac", short(rng), short(rng))
    if kind == "sqrt":
        return ("sqrt", short(rng))
    return (kind, scene.choose(rng, LETTERS), atom(rng))


def formula(rng: np.random.Generator) -> Formula:
    """One to three terms; two sides half of the time."""
    parts: list[Formula] = [term(rng)]
    for _ in range(int(rng.integers(0, 2))):
        parts += [scene.choose(rng, "+-"), term(rng)]
    if rng.random() < 0.5:
        parts = [scene.choose(rng, LETTERS), "=", *parts]
    return ("row", *parts)


def latex(node: Formula) -> str:
    if isinstance(node, str):
        return node
    kind, *parts = node
    if kind == "row":
        return "".join(map(latex, parts))
    if kind in ("^", "_"):
        return f"{latex(parts[0])}{kind}{{{latex(parts[1])}}}"
    return f"\\{kind}" + "".join(f"{{{latex(part)}}}" for part in parts)


# ------------------------------------------------------------------------------------------------------------- layout
@dataclasses.dataclass(frozen=True)
class Laid:
    """A part laid out from (0, 0) on the base line: width, reach above and below, and marks.

    A mark is (x, y, text, size) of a text whose left end lies on the base line, or the corners of a broken line.
    """

    width: float
    above: float
    below: float
    marks: tuple

    def moved(self, dx: float, dy: float) -> tuple:
        """The marks elsewhere."""
        return tuple((m[0] + dx, m[1] + dy, *m[2:]) if isinstance(m[0], (int, float)) else
                     tuple((x + dx, y + dy) for x, y in m) for m in self.marks)  # fmt: skip


def lay(node: Formula, size: int, face: str) -> Laid:
    if isinstance(node, str):
        gap = size * 0.18 if node in "+-=" else size * 0.04
        width = fonts.load(face, size).getlength(node)
        below = 0.22 * size if node in "y" else 0.02 * size
        return Laid(width + 2 * gap, 0.72 * size, below, ((gap, 0.0, node, size),))
    kind, *parts = node
    small = max(LEAST, round(size * SCRIPT))
    if kind == "row":
        return _row([lay(part, size, face) for part in parts])
    if kind in ("^", "_"):
        base, script = lay(parts[0], size, face), lay(parts[1], small, face)
        dy = -0.45 * size if kind == "^" else 0.28 * size
        return Laid(base.width + script.width, max(base.above, script.above - dy), max(base.below, script.below + dy),
                    base.marks + script.moved(base.width, dy))  # fmt: skip
    if kind == "sqrt":
        inner = lay(parts[0], size, face)
        hook, top = 0.5 * size, inner.above + 0.14 * size
        sign = ((0.04 * size, -0.3 * size), (0.16 * size, -0.36 * size), (0.3 * size, inner.below),
                (hook, -top), (hook + inner.width, -top))  # fmt: skip
        return Laid(hook + inner.width + 0.06 * size, top + 1, inner.below + 1, (sign, *inner.moved(hook, 0)))
    over, under = (lay(part, round(size * 0.85), face) for part in parts)
    width, axis = max(over.width, under.width) + 0.1 * size, -0.3 * size
    up, down = axis - 0.14 * size - over.below, axis + 0.16 * size + under.above
    marks = (((0, axis), (width, axis)), *over.moved((width - over.width) / 2, up),
             *under.moved((width - under.width) / 2, down))  # fmt: skip
    return Laid(width + 0.08 * size, over.above - up, under.below + down, marks)


def _row(parts: Sequence[Laid]) -> Laid:
    x, marks = 0.0, ()
    for part in parts:
        marks += part.moved(x, 0)
        x += part.width
    return Laid(x, max(p.above for p in parts), max(p.below for p in parts), marks)


def draw(node: Formula, split: str, rng: np.random.Generator) -> Image.Image | None:
    """The formula as large as fits; None when it does not fit at the least size."""
    face = scene.choose(rng, fonts.files(split, "en"))
    ink = drawing.COLOURS[scene.choose(rng, ("black", "blue", "purple"))].shade(split, rng)
    picture = Image.new("RGB", CANVAS, drawing.background(split, rng))
    pen = ImageDraw.Draw(picture)
    for size in SIZES:
        laid = lay(node, size, face)
        room = CANVAS[0] - 2 * MARGIN - laid.width, CANVAS[1] - 2 * MARGIN - laid.above - laid.below
        if min(room) >= 0:
            x, y = MARGIN + rng.uniform(0, room[0]), MARGIN + laid.above + rng.uniform(0, room[1])
            for mark in laid.moved(round(x), round(y)):
                if isinstance(mark[0], tuple):
                    pen.line(mark, fill=ink, width=1)
                else:
                    pen.text(mark[:2], mark[2], font=fonts.load(face, mark[3]), fill=ink, anchor="ls")
            return picture
    return None


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    while True:
        node = formula(rng)
        answer = latex(node)
        if len(answer) > 1 and read.belongs(answer, split):
            picture = draw(node, split, rng)
            if picture is not None:
                break
    return scene.sample("formula", picture, scene.choose(rng, PROMPTS[lang]), answer, lang, "latex")


def scribbled(sample: Sample) -> list[str]:
    """The formula over and over, what does not compile, and all letters at once."""
    gold = sample.answer
    return [" ".join([gold] * 4), gold + "{", gold + "^", gold + "}", "_" + gold, rf"\frac{{{gold}}}", LETTERS,
            r"\text{" + gold + " or something else, as it may be}", "{" * 200 + gold + "}" * 200]  # fmt: skip


TASKS = (Task("formula", boxed(formulas.formula()), scribbled, make=generate, levels=levels.by_length(7, 14)),)
