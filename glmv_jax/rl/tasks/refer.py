"""Referring expressions: the box of the one object that a phrase picks out among others of its kind.

Meant for 64 x 64 pixels (64 patches of 8) and 64 x 48, objects of 10 pixels and more. A phrase says the place
("leftmost"), the size ("largest"), or the neighbour ("left of the square"), and fits one object by a clear margin.
"""

from __future__ import annotations

import numpy as np

from glmv_jax.data import coordinates, drawing
from glmv_jax.data.questions import scene, spatial
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, geometry
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import showers

CANVASES = ((64, 64), (64, 48), (48, 64))
PROMPTS = {
    "en": ("Box of the {}.", "Where is the {}? Box."),
    "zh": ("框出{}。", "{}在哪里？给出框。"),
}
# Of an extreme object: phrase by language, and what is largest for it.
EXTREMES = {
    "left": ({"en": "leftmost {}", "zh": "最左边的{}"}, lambda t: -t.centre[0]),
    "right": ({"en": "rightmost {}", "zh": "最右边的{}"}, lambda t: t.centre[0]),
    "above": ({"en": "topmost {}", "zh": "最上面的{}"}, lambda t: -t.centre[1]),
    "below": ({"en": "lowest {}", "zh": "最下面的{}"}, lambda t: t.centre[1]),
    "large": ({"en": "largest {}", "zh": "最大的{}"}, lambda t: t.box[2] - t.box[0]),
    "small": ({"en": "smallest {}", "zh": "最小的{}"}, lambda t: t.box[0] - t.box[2]),
}
BESIDE = {
    "left": {"en": "{} left of the {}", "zh": "{1}左边的{0}"},
    "right": {"en": "{} right of the {}", "zh": "{1}右边的{0}"},
    "above": {"en": "{} above the {}", "zh": "{1}上面的{0}"},
    "below": {"en": "{} below the {}", "zh": "{1}下面的{0}"},
}
PLACE_MARGIN, SIZE_MARGIN = 6, 4  # pixels by which an extreme object leads


def extreme(alike: list[scene.Thing], which: str) -> scene.Thing | None:
    """The one of some objects that leads by a clear margin; None when it is close."""
    key = EXTREMES[which][1]
    first, second = sorted(alike, key=key, reverse=True)[:2]
    margin = SIZE_MARGIN if which in ("large", "small") else PLACE_MARGIN
    return first if key(first) - key(second) >= margin else None


def beside(alike: list[scene.Thing], anchor: scene.Thing, side: str) -> scene.Thing | None:
    """The one of some objects that lies clearly on a side of the anchor, when the others clearly do not."""
    sides = [spatial.side_of(thing, anchor) for thing in alike]
    return alike[sides.index(side)] if sides.count(side) == 1 and None not in sides else None


def generate(rng: np.random.Generator, split: str) -> Sample:
    """Two or three objects alike, and one other, the anchor."""
    lang = scene.language(rng)
    while True:
        canvas = scene.choose(rng, CANVASES)
        noun, other = scene.nouns(rng, 2, emoji_share=0.2)
        colours = scene.distinct(rng, tuple(drawing.COLOURS), 2) if noun in drawing.SHAPES else ["", ""]
        kinds = [(noun, colours[0])] * int(rng.integers(2, 4)) + [(other, colours[1])]
        things = scene.scatter(rng, split, canvas, kinds, (10, 20))
        alike, anchor = things[:-1], things[-1]
        if rng.random() < 0.6:
            which = scene.choose(rng, tuple(EXTREMES))
            meant, words = extreme(alike, which), EXTREMES[which][0][lang].format(alike[0].phrase(lang))
        else:
            side = scene.choose(rng, tuple(BESIDE))
            meant = beside(alike, anchor, side)
            words = BESIDE[side][lang].format(alike[0].phrase(lang), anchor.phrase(lang))
        if meant is not None:
            break
    box = scene.written_box(meant, canvas)
    picture = scene.paint(canvas, things, split, rng)
    others = [scene.written_box(thing, canvas) for thing in things if thing is not meant]
    prompt = scene.choose(rng, PROMPTS[lang]).format(words)
    answer = coordinates.format_lists([box])
    return scene.sample("refer", picture, prompt, answer, lang, "box", boxes=[box], others=others)


def confused(sample: Sample) -> list[str]:
    """Each of the other objects, all of them, the gold one among them, and what cheats any grounding."""
    lists = coordinates.format_lists
    others, gold = sample.meta["others"], sample.meta["boxes"]
    return showers(sample) + [lists([box]) for box in others] + [lists(others), lists(gold + others)]


LEVELS = levels.by_number("others", 3)
TASKS = (Task("refer", boxed(geometry.boxes(threshold=0.5, graded=0.5)), confused, make=generate, levels=LEVELS),)
