"""Reading all the text of a small page: two or three short strings, one below the other, "7KQ B4 X9"."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import fonts
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample

PROMPTS = {"en": ("Transcribe.",), "zh": ("抄写。",)}
CANVASES = ((64, 32), (64, 48))
MARGIN = 2


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, canvas = scene.language(rng), scene.choose(rng, CANVASES)
    rows = [read.string(rng, lang, split) for _ in range(canvas[1] // 16)]
    picture = write(canvas, rows, lang, split, rng)
    return scene.description("lines", picture, scene.choose(rng, PROMPTS[lang]), " ".join(rows), lang)


def write(canvas: tuple[int, int], rows: list[str], lang: str, split: str, rng: np.random.Generator) -> Image.Image:
    """The rows in one face and colour, each in its share of the height, as large as fits or up to a quarter smaller."""
    ink, paper = read.ink_and_paper(split, rng)
    picture = Image.new("RGB", canvas, paper)
    pen, name = ImageDraw.Draw(picture), scene.choose(rng, fonts.files(split, lang))
    height = canvas[1] // len(rows)
    for i, row in enumerate(rows):
        read.place(pen, row, name, (0, i * height, canvas[0], (i + 1) * height), MARGIN, ink, rng)
    return picture
