"""The centre of a named object among 1 to 3: [[x,y]] in the 0..999 convention. Any point of its box is right."""

from __future__ import annotations

import numpy as np

from glmv_jax.data import coordinates
from glmv_jax.data.questions import ground, scene
from glmv_jax.data.records import Sample

PROMPTS = {
    "en": ("Where is the {}? Point.", "Point at the {}."),
    "zh": ("{}在哪里？给出点。", "指出{}。"),
}


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    things, canvas = ground.objects(rng, split)
    points = [coordinates.encode_point(each.centre, *canvas) for each in things]
    turns = [(scene.choose(rng, PROMPTS[lang]).format(each.phrase(lang)), coordinates.format_lists([point]))
             for each, point in zip(things, points)]  # fmt: skip
    facts = {"boxes": [scene.written_box(things[0], canvas)], "point": list(points[0])}
    picture = scene.paint(canvas, things, split, rng)
    return scene.quiz("point", picture, turns, lang, "point", **facts)
