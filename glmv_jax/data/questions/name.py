"""Naming an emoji in English or in Chinese; the prompt says in which.

Only concepts of the training split that have a short name of one word in both languages: a small model cannot name what
it was never told. Held-out pictures show the same concepts at other positions, sizes and on other backgrounds.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from glmv_jax.data import drawing, emoji
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

# English names; those whose concept is held out are left out when the list is read.
NAMES = """
cat dog horse cow pig rabbit bear panda lion elephant zebra monkey frog turtle fish whale octopus butterfly owl penguin
fox koala banana peach lemon strawberry watermelon pineapple tomato carrot bread egg pizza hamburger doughnut
automobile bus bicycle airplane helicopter ship key bell umbrella pencil scissors hammer crown guitar drum camera
telephone balloon door chair glasses sun fire rainbow cactus rose sunflower robot ghost skull house
""".split()
PROMPTS = {
    "en": ("What is it? English.", "Name it in English.", "这是什么？用英文答。"),
    "zh": ("这是什么？用中文答。", "用中文说出名称。", "Name it in Chinese."),
}
CANVASES = ((48, 48), (32, 32), (48, 32), (32, 48))


@functools.cache
def concepts() -> tuple[int, ...]:
    """Indices of the emoji that are asked about."""
    train = set(emoji.split("train"))
    return tuple(i for i in map(emoji.find, NAMES) if i in train)


def generate(rng: np.random.Generator, split: str) -> Sample:
    index, lang = scene.choose(rng, concepts()), scene.language(rng)
    canvas = scene.choose(rng, CANVASES)
    picture = Image.new("RGB", canvas, drawing.background(split, rng))
    corners = None
    while corners is None:
        stamp = emoji.stamp(index, int(rng.integers(24, min(canvas) - 1)))
        corners = scene.place(rng, split, canvas, [stamp.size], gap=1)
    emoji.paste(picture, stamp, *corners[0])
    answer = emoji.load()[index].name(lang)
    return scene.sample("name", picture, scene.choose(rng, PROMPTS[lang]), answer, lang, "exact", concept=index)
