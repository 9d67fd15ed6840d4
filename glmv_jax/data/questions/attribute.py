"""Colour of a named shape, or shape of a named colour, among 1 to 3 shapes of different shapes and colours."""

from __future__ import annotations

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

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
    lang, count = scene.language(rng), int(rng.integers(1, 4))
    shapes = scene.distinct(rng, tuple(drawing.SHAPES), count)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), count)
    canvas = scene.choose(rng, scene.CANVASES)
    things = scene.scatter(rng, split, canvas, list(zip(shapes, colours)), (18, 26))
    asked = things[0]
    colour, shape = drawing.COLOURS[asked.colour].names[lang], asked.name(lang)
    of_colour = rng.random() < 0.5
    template = scene.choose(rng, (COLOUR_PROMPTS if of_colour else SHAPE_PROMPTS)[lang])
    prompt, answer = (template.format(shape), colour) if of_colour else (template.format(colour), shape)
    facts = {"aliases": aliases(answer), "asked": "colour" if of_colour else "shape"}
    picture = scene.paint(canvas, things, split, rng)
    return scene.sample("attribute", picture, prompt, answer, lang, "exact", **facts)
