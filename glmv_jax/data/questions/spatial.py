"""On which side of one object another one lies: left, right, above or below.

The distance along the right answer is at least twice the distance across, so the answer is never a matter of taste.
"""

from __future__ import annotations

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

SIDES = {
    "left": {"en": "left", "zh": "左边"},
    "right": {"en": "right", "zh": "右边"},
    "above": {"en": "above", "zh": "上面"},
    "below": {"en": "below", "zh": "下面"},
}
ALIASES = {
    "left": {"en": ["on the left"], "zh": ["左", "左侧", "左面"]},
    "right": {"en": ["on the right"], "zh": ["右", "右侧", "右面"]},
    "above": {"en": ["top", "over"], "zh": ["上", "上边", "上方"]},
    "below": {"en": ["bottom", "under"], "zh": ["下", "下边", "下方"]},
}
PROMPTS = {
    "en": ("Which side of the {1} is the {0}?", "Where is the {0} from the {1}?"),
    "zh": ("{0}在{1}的哪边？", "{0}在{1}的哪一面？"),
}

CANVASES = ((48, 48), (64, 48), (48, 64))  # wide enough both ways: the shape of the picture must not tell the answer


def side_of(a: scene.Thing, b: scene.Thing) -> str | None:
    """Where `a` lies, seen from `b`; None when it is not clear."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if abs(dx) >= 2 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 2 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, wanted, canvas = scene.language(rng), scene.choose(rng, tuple(SIDES)), scene.choose(rng, CANVASES)
    nouns = scene.nouns(rng, 2, emoji_share=0.2)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), 2) if nouns[0] in drawing.SHAPES else ["", ""]
    while True:
        a, b = scene.scatter(rng, split, canvas, list(zip(nouns, colours)), (14, 22))
        if side_of(a, b) == wanted:
            break
        if side_of(b, a) == wanted:
            a, b = b, a
            break
    prompt = scene.choose(rng, PROMPTS[lang]).format(a.phrase(lang), b.phrase(lang))
    picture = scene.paint(canvas, (a, b), split, rng)
    facts = {"aliases": ALIASES[wanted][lang], "choices": [names[lang] for names in SIDES.values()]}
    return scene.sample("spatial", picture, prompt, SIDES[wanted][lang], lang, "exact", **facts)
