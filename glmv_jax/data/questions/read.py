"""Reading a short string: 2 or 3 Latin capitals and digits, or 2 Chinese characters; in training also single ones.

Strings are random, so they cannot be guessed, and a string belongs to one split only (by hash). The symbols are few,
because every one must be learnt, and none looks like another in any face. Held-out pictures use other font families.
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
    ink, paper = ink_and_paper(split, rng)
    picture = Image.new("RGB", canvas, paper)
    name = scene.choose(rng, fonts.files(split, lang))
    place(ImageDraw.Draw(picture), text, name, (0, 0, *canvas), MARGIN, ink, rng)
    return picture


def ink_and_paper(split: str, rng: np.random.Generator) -> tuple[drawing.RGB, drawing.RGB]:
    """Dark on light, one time in five light on dark."""
    ink = drawing.COLOURS[scene.choose(rng, ("red", "green", "blue", "purple", "black"))].shade(split, rng)
    paper = drawing.background(split, rng)
    return (paper, ink) if rng.random() < 0.2 else (ink, paper)


def place(
    pen: ImageDraw.ImageDraw, text: str, face: str, area: tuple[int, int, int, int], margin: int, ink: drawing.RGB,
    rng: np.random.Generator,
) -> None:
    """Writes into the area (x1, y1, x2, y2), as large as fits up to 32 pixels or up to a quarter smaller, anywhere."""
    width, height = area[2] - area[0], area[3] - area[1]
    left, top, right, bottom = fonts.load(face, 32).getbbox(text)
    room = min((width - 2 * margin) / (right - left), (height - 2 * margin) / (bottom - top))
    font = fonts.load(face, max(8, int(32 * min(room, 1.0) * rng.uniform(0.78, 1.0))))
    left, top, right, bottom = font.getbbox(text)
    x = int(rng.integers(margin, max(margin, width - margin - (right - left)) + 1))
    y = int(rng.integers(margin, max(margin, height - margin - (bottom - top)) + 1))
    pen.text((area[0] + x - left, area[1] + y - top), text, font=font, fill=ink)


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    text = string(rng, lang, split)
    picture = write(ALONE if len(text) == 1 else CANVAS, text, lang, split, rng)
    return scene.sample("read", picture, scene.choose(rng, PROMPTS[lang]), text, lang, "text")
