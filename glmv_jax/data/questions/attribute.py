"""Colour of a named shape, or shape of a named colour, among 1 to 3 shapes of different shapes and colours."""

from __future__ import annotations

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

COUNTS = (1, 1, 2, 3)
COLOUR_PROMPTS = {
    "en": ("What colour is the {}?", "The {} is which colour?"),
    "zh": ("{}是什么颜色？", "图中的{}是什么颜色？"),
}
SHAPE_PROMPTS = {
    "en": ("What shape is {}?", "Which shape is {}?"),
    "zh": ("{}的是什么形状？", "哪种形状是{}？"),
}


def aliases(name: str) -> list[str]:
    """Chinese colours and shapes may be said without their last character: 红色 = 红."""
    return [name[:-1]] if name.endswith(("色", "形")) else []


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, count = scene.language(rng), scene.choose(rng, COUNTS)
    shapes = scene.distinct(rng, tuple(drawing.SHAPES), count)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), count)
    canvas = scene.choose(rng, scene.CANVASES)
    things = scene.scatter(rng, split, canvas, list(zip(shapes, colours)), (16, 26))
    # One question an object: "which colour" after "which shape" would be answered by the turn before.
    turns = []
    for each in things:
        colour, shape = drawing.COLOURS[each.colour].names[lang], each.name(lang)
        if rng.random() < 0.5:
            turns.append((scene.choose(rng, COLOUR_PROMPTS[lang]).format(shape), colour))
        else:
            turns.append((scene.choose(rng, SHAPE_PROMPTS[lang]).format(colour), shape))
    facts = {"aliases": aliases(turns[0][1])}
    picture = scene.paint(canvas, things, split, rng)
    return scene.quiz("attribute", picture, turns, lang, "exact", **facts)
