"""Reading a short string: 2 or 3 Latin capitals and digits, or 2 Chinese characters; in training also single ones.

Strings are random, so they cannot be guessed, and a string belongs to one split only (by hash). The symbols are few,
because every one must be learnt. Held-out pictures use other font families.
"""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

ALPHABET = "ACEHKLPTUXY23479"
CHARACTERS = "山水火日人口大小中上天田心马门王"
PROMPTS = {
    "en": ("Read the text.", "What does it say?", "What is written here?"),
    "zh": ("读出文字。", "上面写了什么？", "图中的文字是什么？"),
}
ALONE, CANVAS = (32, 32), (48, 32)  # of one symbol, and of several
MARGIN = 3
HELD_OUT_SHARE = 4  # one string in four


def belongs(text: str, split: str) -> bool:
    """Whether the string is one of the split's."""
    return (zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0) == (split == "heldout")


def string(rng: np.random.Generator, lang: str, split: str) -> str:
    longest, symbols = (3, ALPHABET) if lang == "en" else (2, CHARACTERS)
    while True:
        # A symbol alone is what a string is learnt from. No held-out picture asks for one: it belongs to no split.
        length = int(rng.integers(1 if split == "train" else 2, longest + 1))
        text = "".join(symbols[i] for i in rng.integers(len(symbols), size=length))
        if length == 1 or belongs(text, split):
            return text


def write(canvas: tuple[int, int], text: str, lang: str, split: str, rng: np.random.Generator) -> Image.Image:
    """The text as large as fits, or up to a quarter smaller, anywhere in the canvas; dark on light or light on dark."""
    ink = drawing.COLOURS[scene.choose(rng, ("red", "green", "blue", "purple", "black"))].shade(split, rng)
    paper = drawing.background(split, rng)
    if rng.random() < 0.2:
        ink, paper = paper, ink
    picture = Image.new("RGB", canvas, paper)
    name = scene.choose(rng, fonts.files(split, lang))
    left, top, right, bottom = fonts.load(name, 32).getbbox(text)
    room = min((canvas[0] - 2 * MARGIN) / (right - left), (canvas[1] - 2 * MARGIN) / (bottom - top))
    font = fonts.load(name, max(8, int(32 * min(room, 1.0) * rng.uniform(0.78, 1.0))))
    left, top, right, bottom = font.getbbox(text)
    x = int(rng.integers(MARGIN, int(max(MARGIN, canvas[0] - MARGIN - (right - left))) + 1))
    y = int(rng.integers(MARGIN, int(max(MARGIN, canvas[1] - MARGIN - (bottom - top))) + 1))
    ImageDraw.Draw(picture).text((x - left, y - top), text, font=font, fill=ink)
    return picture


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    text = string(rng, lang, split)
    picture = write(ALONE if len(text) == 1 else CANVAS, text, lang, split, rng)
    return scene.sample("read", picture, scene.choose(rng, PROMPTS[lang]), text, lang, "text")
