"""Two to four pictures: which of them has the most of a thing, or is the only one that has it. Legible at the 40 pixels
that each is drawn at.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import count, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import visual

CANVAS = (40, 40)
MOST = 4  # of a thing in a picture
PROMPTS = {
    "most": {"en": "Which picture has the most {}? Number.", "zh": "哪张图的{}最多？编号。"},
    "only": {"en": "Which picture has a {}? Number.", "zh": "哪张图有{}？编号。"},
}


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, form, pictures = scene.language(rng), scene.choose(rng, tuple(PROMPTS)), int(rng.integers(2, 5))
    shapes = scene.distinct(rng, tuple(drawing.SHAPES), 2)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), 3)
    asked = (shapes[0], colours[0])
    # The others share its shape or its colour, so that neither of them alone tells the answer.
    others = [(shapes[0], colours[1]), (shapes[1], colours[0]), (shapes[1], colours[2])]
    if form == "most":
        numbers = [int(n) for n in rng.permutation(MOST + 1)[:pictures]]
    else:
        numbers = [0] * pictures
        numbers[int(rng.integers(pictures))] = 1
    shown = [_picture(rng, split, asked, number, others) for number in numbers]
    right = int(np.argmax(numbers))
    thing = shown[right][0]
    noun = count.plural(thing.phrase("en")) if (form, lang) == ("most", "en") else thing.phrase(lang)
    images = tuple(scene.paint(CANVAS, things, split, rng) for things in shown)
    facts = {"numbers": numbers, "choices": [str(n + 1) for n in range(pictures)]}
    prompt = PROMPTS[form][lang].format(noun)
    made = scene.sample("compare", images[0], prompt, str(right + 1), lang, "numeric", **facts)
    return dataclasses.replace(made, images=images)


def _picture(rng: np.random.Generator, split: str, asked: Any, number: int, others: Any) -> list[scene.Thing]:
    """`number` of the asked things, and others so that there are always things to be seen, up to MOST + 1."""
    rest = int(rng.integers(1, max(2, MOST + 2 - number)))
    kinds = [asked] * number + [scene.choose(rng, others) for _ in range(rest)]
    return scene.scatter(rng, split, CANVAS, kinds, (9, 12))


LEVELS = levels.by_number("choices", 3, 4)
TASKS = (Task("compare", boxed(text.number()), visual.other_numbers, make=generate, levels=LEVELS),)
