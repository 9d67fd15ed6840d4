"""The 2D box of a named object among 1 to 3: [[x1,y1,x2,y2]] in the 0..999 convention."""

from __future__ import annotations

import numpy as np

from glmv_jax.data import coordinates, drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

PROMPTS = {
    "en": ("Where is the {}? Box.", "Box of the {}."),
    "zh": ("{}在哪里？给出框。", "框出{}。"),
}

COUNTS = (1, 1, 2, 3)  # of objects: where a lone one is comes before which one is asked for


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    things, canvas = objects(rng, split)
    boxes = [scene.written_box(each, canvas) for each in things]
    turns = [(scene.choose(rng, PROMPTS[lang]).format(each.phrase(lang)), coordinates.format_lists([box]))
             for each, box in zip(things, boxes)]  # fmt: skip
    picture = scene.paint(canvas, things, split, rng)
    return scene.quiz("ground", picture, turns, lang, "box", boxes=boxes[:1])


def objects(rng: np.random.Generator, split: str) -> tuple[list[scene.Thing], tuple[int, int]]:
    """1 to 3 large objects with different nouns and the size of their canvas; the first one is asked for."""
    canvas, count = scene.choose(rng, scene.CANVASES), scene.choose(rng, COUNTS)
    nouns = scene.nouns(rng, count, emoji_share=0.2)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), count) if nouns[0] in drawing.SHAPES else [""] * count
    return scene.scatter(rng, split, canvas, list(zip(nouns, colours)), (14, 26)), canvas
