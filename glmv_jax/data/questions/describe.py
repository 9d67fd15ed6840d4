"""All objects of a scene from left to right: "red circle,blue star", or with centres, "red circle[[312,540]],..."."""

from __future__ import annotations

import numpy as np

from glmv_jax.data import coordinates, drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

PLAIN = {"en": ("What is there?",), "zh": ("有什么？",)}
PLACED = {"en": ("What is where?",), "zh": ("什么在哪里？",)}
COUNTS = (1, 1, 1, 2, 2, 3)


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, canvas = scene.language(rng), scene.choose(rng, scene.CANVASES)
    things = scene.scatter(rng, split, canvas, objects(rng, scene.choose(rng, COUNTS)), (16, 26))
    things.sort(key=lambda each: each.centre)
    placed = rng.random() < 0.5
    prompt = scene.choose(rng, (PLACED if placed else PLAIN)[lang])
    points = [coordinates.encode_point(each.centre, *canvas) for each in things]
    centres = [coordinates.format_lists([point]) if placed else "" for point in points]
    answer = ",".join(each.phrase(lang) + centre for each, centre in zip(things, centres))
    picture = scene.paint(canvas, things, split, rng)
    boxes = [scene.written_box(each, canvas) for each in things]
    return scene.description("describe", picture, prompt, answer, lang, boxes=boxes)


def objects(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """(noun, colour) of `count` objects, any of which may be alike; "" is the colour of an emoji."""
    drawn = []
    for _ in range(count):
        if rng.random() < 0.2:
            drawn.append((scene.choose(rng, scene.OBJECTS), ""))
        else:
            drawn.append((scene.choose(rng, tuple(drawing.SHAPES)), scene.choose(rng, tuple(drawing.COLOURS))))
    return drawn
