"""Captions for pretraining: "two red stars and a blue circle", "两个红色星形和一个蓝色圆形", "cat"."""

from __future__ import annotations

import dataclasses

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import count, name, scene
from glmv_jax.data.records import Sample

NUMBERS = {"en": ("a", "two", "three"), "zh": ("一个", "两个", "三个")}
AND = {"en": " and ", "zh": "和"}


def phrase(each: scene.Thing, number: int, lang: str) -> str:
    """"two red stars", "一个猫"."""
    words = each.phrase(lang)
    if lang == "zh":
        return NUMBERS["zh"][number - 1] + words
    if number > 1:
        return f"{NUMBERS['en'][number - 1]} {count.plural(words)}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def generate(rng: np.random.Generator, split: str) -> Sample:
    """A third of the captions are the bare name of an emoji."""
    if rng.random() < 1 / 3:
        named = name.generate(rng, split)
        meta = {**named.meta, "check": "text"}
        return dataclasses.replace(named, source="caption", prompt="", boxed=False, meta=meta)
    lang, kinds = scene.language(rng), int(rng.integers(1, 3))
    nouns = scene.nouns(rng, kinds, emoji_share=0.3)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), kinds) if nouns[0] in drawing.SHAPES else [""] * kinds
    # The more numerous kind comes first, so that a picture has one caption.
    numbers = sorted((int(n) for n in rng.integers(1, 4, kinds)), reverse=True)
    if len(set(numbers)) < kinds:
        nouns, colours = zip(*sorted(zip(nouns, colours)))
    wanted = [(nouns[k], colours[k]) for k in range(kinds) for _ in range(numbers[k])]
    canvas = scene.choose(rng, scene.CANVASES)
    things = scene.scatter(rng, split, canvas, wanted, (12, 18))
    firsts = [things[0], things[numbers[0]]] if kinds == 2 else things[:1]
    text = AND[lang].join(phrase(each, number, lang) for each, number in zip(firsts, numbers))
    picture = scene.paint(canvas, things, split, rng)
    return scene.description("caption", picture, "", text, lang)
