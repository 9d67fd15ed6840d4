"""Describing a picture in a sentence, graded by a model: there are too many right sentences for a rule.

Meant for the usual small canvases (48 x 48, 64 x 32 pixels). The reference lists what is in the picture, exactly; the
rubric counts it. Without a judge this task raises and says so: no rule stands in for one. Its answers are not boxed,
and one that holds a box gets the lowest reward (GLM-V report, arXiv 2507.01006, section 5.2).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import scene, spatial
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.task import Task, unjudged

PROMPTS = {
    "en": ("Describe the picture in one sentence.", "Say in one sentence what is where."),
    "zh": ("用一句话描述图片。", "用一句话说出什么在哪里。"),
}
RUBRIC = (
    "The question asks for a description of a picture. The reference lists everything that is in it, one fact a line: "
    "every object with its colour, and where they lie; there is nothing else. Give one share of the grade for each "
    "fact that the answer states, in any words and in the language of the question; a fact half right (the shape "
    "without its colour) is half a share. Take a share off for each claim that the reference contradicts or does not "
    "hold: an object that is not there, a wrong colour, a wrong number, a wrong side. Praise, guesses, alternatives "
    "('red or blue') and repetitions are no facts. An answer of more than one sentence, or in another language, gets "
    "at most half."
)
SIDES = {
    "left": {"en": "the {} is left of the {}", "zh": "{}在{}左边"},
    "right": {"en": "the {} is right of the {}", "zh": "{}在{}右边"},
    "above": {"en": "the {} is above the {}", "zh": "{}在{}上面"},
    "below": {"en": "the {} is below the {}", "zh": "{}在{}下面"},
}


def generate(rng: np.random.Generator, split: str) -> Sample:
    """One to three objects, all different."""
    lang, number = scene.language(rng), int(rng.integers(1, 4))
    nouns = scene.nouns(rng, number, emoji_share=0.4)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), number) if nouns[0] in drawing.SHAPES else [""] * number
    canvas = scene.choose(rng, scene.CANVASES)
    things = scene.scatter(rng, split, canvas, list(zip(nouns, colours)), (12, 22))
    facts = [f"1 {each.phrase(lang)}" for each in things]
    for a, b in zip(things, things[1:]):
        if side := spatial.side_of(a, b):
            facts.append(SIDES[side][lang].format(a.phrase(lang), b.phrase(lang)))
    picture = scene.paint(canvas, things, split, rng)
    drawn = scene.sample("captioning", picture, scene.choose(rng, PROMPTS[lang]), "\n".join(facts), lang, "judge")
    return dataclasses.replace(drawn, boxed=False)


TASKS = (Task("captioning", unjudged, make=generate, rubric=RUBRIC, levels=levels.by_length(14, 44)),)
