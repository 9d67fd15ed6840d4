"""Reading a line: two to four English words, or five to eight Chinese characters.

Meant for 128 x 32 pixels (64 patches of 8), letters of 11 pixels and more. A line belongs to one split by its hash.
"""

from __future__ import annotations

import numpy as np

from glmv_jax.data import documents
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import misread

PROMPTS = {
    "en": ("Read the line.", "What does the line say?"),
    "zh": ("读出这一行。", "这一行写了什么？"),
}
CANVAS = (128, 32)
LENGTHS = {"en": (8, 16), "zh": (5, 8)}
JOINT = {"en": " ", "zh": ""}


def line(rng: np.random.Generator, lang: str, split: str) -> str:
    """Words of the language, as many as fit, of this split."""
    shortest, longest = LENGTHS[lang]
    while True:
        words = [scene.choose(rng, documents.body_words(lang)) for _ in range(int(rng.integers(2, 5)))]
        drawn = JOINT[lang].join(words)
        letters = drawn.replace(" ", "").replace("-", "")
        if shortest <= len(drawn) <= longest and letters.isalpha() and read.belongs(drawn, split):
            return drawn


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    drawn = line(rng, lang, split)
    picture = read.write(CANVAS, drawn, lang, split, rng)
    return scene.sample("line", picture, scene.choose(rng, PROMPTS[lang]), drawn, lang, "text")


def skimmed(sample: Sample) -> list[str]:
    """As of words, and its start, every third letter, its first letters in order."""
    gold = sample.answer
    return misread(sample) + [gold[:2], gold[::3], "".join(sorted(gold))[:2]]


TASKS = (Task("line", boxed(text.reading), skimmed, make=generate, levels=levels.by_length(8, 13)),)
