"""Counting the objects of one kind, 1 to 5 of them, among up to 2 others."""

from __future__ import annotations

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

PROMPTS = {
    "en": ("How many {}?", "Count the {}."),
    "zh": ("有几个{}？", "数一数{}。"),
}
MOST = 5


def plural(noun: str) -> str:
    """English plural of the nouns used here."""
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    asked, other = scene.nouns(rng, 2, emoji_share=0.2)
    count, others = int(rng.integers(1, MOST + 1)), int(rng.integers(0, 3))
    colours = scene.distinct(rng, tuple(drawing.COLOURS), 2) if asked in drawing.SHAPES else ["", ""]
    kinds = [(asked, colours[0])] * count + [(other, colours[1])] * others
    canvas = scene.choose(rng, scene.CANVASES)
    things = scene.scatter(rng, split, canvas, kinds, (10, 14))
    turns = []
    for each, number in ((things[0], count), (things[-1], others)):
        noun = plural(each.phrase("en")) if lang == "en" else each.phrase("zh")
        turns.append((scene.choose(rng, PROMPTS[lang]).format(noun), str(number)))
    picture = scene.paint(canvas, things, split, rng)
    return scene.quiz("count", picture, turns[: 1 + (others > 0)], lang, "numeric", noun=asked, others=others)
