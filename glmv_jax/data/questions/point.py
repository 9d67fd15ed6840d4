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
    x1, y1, x2, y2 = things[0].box
    point = coordinates.encode_point(((x1 + x2) / 2, (y1 + y2) / 2), *canvas)
    prompt = scene.choose(rng, PROMPTS[lang]).format(things[0].name(lang))
    facts = {"boxes": [scene.written_box(things[0], canvas)], "point": list(point)}
    picture = scene.paint(canvas, things, split, rng)
    return scene.sample("point", picture, prompt, coordinates.format_lists([point]), lang, "point", **facts)
