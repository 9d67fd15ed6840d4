"""Reading a short string: 2 to 4 Latin capitals and digits, or 2 Chinese characters.

Strings are random, so they cannot be guessed, and a string belongs to one split only (by hash). Letters and digits that
look alike in some face (I, O, 0, 1) are left out. Held-out pictures use other font families.
"""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample

ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
CHARACTERS = "山水火木日月人口手大小上下中左右天风雨云花鸟鱼马牛羊米茶书车门心金石田王光星电家"
PROMPTS = {
    "en": ("Read the text.", "What does it say?", "What is written here?"),
    "zh": ("读出文字。", "上面写了什么？", "图中的文字是什么？"),
}
CANVASES = ((64, 32), (96, 32), (80, 48), (64, 64))
MARGIN = 3
HELD_OUT_SHARE = 4  # one string in four


def belongs(text: str, split: str) -> bool:
    """Whether the string is one of the split's."""
    return (zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0) == (split == "heldout")


def string(rng: np.random.Generator, lang: str, split: str) -> str:
    while True:
        length, symbols = (int(rng.integers(2, 5)), ALPHABET) if lang == "en" else (2, CHARACTERS)
        text = "".join(symbols[i] for i in rng.integers(len(symbols), size=length))
        if belongs(text, split):
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
    x = int(rng.integers(MARGIN, max(MARGIN, canvas[0] - MARGIN - (right - left)) + 1))
    y = int(rng.integers(MARGIN, max(MARGIN, canvas[1] - MARGIN - (bottom - top)) + 1))
    ImageDraw.Draw(picture).text((x - left, y - top), text, font=font, fill=ink)
    return picture


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    text = string(rng, lang, split)
    picture = write(scene.choose(rng, CANVASES), text, lang, split, rng)
    return scene.sample("read", picture, scene.choose(rng, PROMPTS[lang]), text, lang, "text")
