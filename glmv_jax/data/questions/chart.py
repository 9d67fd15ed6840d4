"""Reading a bar chart: the value of a bar (1 to 5, a grid line a unit), or which bar is tallest or shortest."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

VALUE = {"en": ("Value of {}?", "How tall is {}?"), "zh": ("{}的值是多少？", "{}有多高？")}
TALLEST = {"en": ("Tallest bar?", "Which bar is tallest?"), "zh": ("最高的是哪个？", "哪个柱子最高？")}
SHORTEST = {"en": ("Shortest bar?", "Which bar is shortest?"), "zh": ("最低的是哪个？", "哪个柱子最低？")}
CANVASES = ((48, 48), (64, 48))
LABELS = "ABC"
MOST = 5
LEFT, BOTTOM = 9, 10  # room for the numbers and for the labels, pixels


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, canvas = scene.language(rng), scene.choose(rng, CANVASES)
    heights = values(rng)
    picture = draw(canvas, heights, split, rng)
    facts: dict[str, Any] = {"values": dict(zip(LABELS, heights))}
    values_of = [(scene.choose(rng, VALUE[lang]).format(label), str(v)) for label, v in zip(LABELS, heights)]
    extremes = [(scene.choose(rng, forms[lang]), LABELS[heights.index(value)])
                for forms, value in ((TALLEST, max(heights)), (SHORTEST, min(heights)))]  # fmt: skip
    # Half of the first questions ask for a value, half for the tallest or shortest bar.
    values_of, extremes = (scene.distinct(rng, turns, len(turns)) for turns in (values_of, extremes))
    if rng.random() < 0.5:
        return scene.quiz("chart", picture, values_of + extremes, lang, "numeric", **facts)
    facts["choices"] = list(LABELS[: len(heights)])
    return scene.quiz("chart", picture, extremes + values_of, lang, "exact", **facts)


def values(rng: np.random.Generator) -> list[int]:
    """Heights of two or three bars, all different, so that the tallest and the shortest are one bar each."""
    return [int(v) + 1 for v in rng.permutation(MOST)[: int(rng.integers(2, len(LABELS) + 1))]]


def draw(canvas: tuple[int, int], values: list[int], split: str, rng: np.random.Generator) -> Image.Image:
    """Bars over their letters, a grid line at every unit, the even numbers at the left."""
    width, height = canvas
    picture = Image.new("RGB", canvas, drawing.background(split, rng))
    pen = ImageDraw.Draw(picture)
    unit = (height - BOTTOM - 3) // MOST
    floor = height - BOTTOM
    font = fonts.face(split, "en", rng, 9)
    for value in range(MOST + 1):
        y = floor - unit * value
        pen.line((LEFT, y, width - 1, y), fill=(90, 90, 90) if value == 0 else (190, 190, 190))
        if value % 2 == 0 and value:
            pen.text((LEFT - 2, y), str(value), font=font, fill=(60, 60, 60), anchor="rm")
    slot = (width - LEFT - 1) / len(values)
    thickness = scene.choose(rng, (7, 9) if split == "train" else (8,))
    one_colour = scene.choose(rng, tuple(drawing.COLOURS)) if rng.random() < 0.5 else ""
    colours = [one_colour] * len(values) if one_colour else scene.distinct(rng, tuple(drawing.COLOURS), len(values))
    for i, (value, colour) in enumerate(zip(values, colours)):
        middle = round(LEFT + slot * (i + 0.5))
        x = middle - thickness // 2
        box = (x, floor - unit * value, x + thickness - 1, floor - 1)
        pen.rectangle(box, fill=drawing.COLOURS[colour].shade(split, rng))
        pen.text((middle, height - 1), LABELS[i], font=font, fill=(20, 20, 20), anchor="mb")
    return picture
