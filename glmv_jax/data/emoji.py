"""Bilingual image-text pairs: 1,849 emoji (Noto, no skin tones) with English and Chinese names and keywords (CLDR).

Held out by concept. Emoji that differ only in gender or direction ("cook", "woman cook", "man cook"), families with the
same number of members, and emoji with the very same picture (Norway and Svalbard) are one concept. 180 of the 1,653
concepts, picked by hash, are held out; the simplest emoji of each stands for it in the held-out split, and its variants
are in neither split. All other emoji are the training split.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np
from PIL import Image

from glmv_jax.data import corpus
from glmv_jax.data.records import Pair
from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.typing import UserError

HELD_OUT = 180
LANGUAGES = ("en", "zh")


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji. `texts[lang]` is (name, keyword, keyword, ...); `id` is its code points in hexadecimal."""

    index: int
    id: str
    size: tuple[int, int]
    concept: str
    texts: dict[str, tuple[str, ...]]

    def name(self, lang: str) -> str:
        return self.texts[lang][0]


@functools.cache
def load() -> tuple[Emoji, ...]:
    """All emoji, in the order of the atlas."""
    lines = corpus.path("emoji.tsv").read_text(encoding="utf-8").splitlines()[1:]
    emoji = []
    for index, line in enumerate(lines):
        id_, width, height, concept, en, en_keywords, zh, zh_keywords = line.split("\t")
        texts = {"en": (en, *filter(None, en_keywords.split("|"))), "zh": (zh, *filter(None, zh_keywords.split("|")))}
        emoji.append(Emoji(index, id_, (int(width), int(height)), concept, texts))
    return tuple(emoji)


@functools.cache
def _by_name() -> dict[str, int]:
    return {e.name("en"): e.index for e in load()}


def find(name: str) -> int:
    """Index of the emoji with this English name."""
    return _by_name()[name]


@functools.cache
def split(name: str) -> tuple[int, ...]:
    """Indices of the emoji in "train" or "heldout", in the order of the atlas."""
    if name not in ("train", "heldout"):
        raise UserError(f"emoji split {name!r} does not exist; use train or heldout")
    concepts = {e.concept for e in load()}
    order = sorted(concepts, key=lambda concept: hashlib.sha256(concept.encode()).digest())
    held = set(order[:HELD_OUT])
    if name == "train":
        return tuple(e.index for e in load() if e.concept not in held)
    simplest: dict[str, Emoji] = {}
    for e in sorted(load(), key=lambda e: (len(e.id), e.index)):
        if e.concept in held:
            simplest.setdefault(e.concept, e)
    return tuple(sorted(e.index for e in simplest.values()))


@functools.cache
def _sheet(number: int) -> Image.Image:
    return Image.open(corpus.path(f"emoji-{number}.webp")).convert("RGBA")


@functools.lru_cache(maxsize=4096)
def image(index: int) -> Image.Image:
    """The picture, RGBA, cropped to its ink, longest side 72. Shared, do not write to it. A sheet costs 20 ms once."""
    cell = index % corpus.PER_SHEET
    x, y = cell % corpus.COLUMNS * corpus.CELL, cell // corpus.COLUMNS * corpus.CELL
    width, height = load()[index].size
    return _sheet(index // corpus.PER_SHEET).crop((x, y, x + width, y + height))


@functools.lru_cache(maxsize=4096)
def stamp(index: int, side: int) -> Image.Image:
    """The picture scaled so that its longest side is `side` pixels. Shared, do not write to it."""
    picture = image(index)
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BILINEAR)


def paste(canvas: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    """Draws an RGBA picture over the canvas with its corner at (x, y)."""
    canvas.paste(picture, (x, y), picture)


def plain(index: int, area: int = 64 * 64) -> Image.Image:
    """The emoji on white in a canvas of its own aspect ratio and about `area` pixels, with a narrow margin."""
    width, height = image(index).size
    scale = (area / (width * height)) ** 0.5
    canvas = Image.new("RGB", (max(16, int(width * scale)), max(16, int(height * scale))), "white")
    fit = min((canvas.width - 4) / width, (canvas.height - 4) / height)
    picture = stamp(index, int(fit * max(width, height)))
    paste(canvas, picture, (canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2)
    return canvas


def augmented(index: int, rng: np.random.Generator, area: int = 64 * 64) -> Image.Image:
    """The emoji turned by up to 12 degrees, scaled and placed at random on a plain colour.

    The canvas has between half of `area` and `area` pixels; its aspect ratio is within a factor 1.5 of the emoji's own.
    """
    picture = image(index)
    aspect = picture.width / picture.height * np.exp(rng.uniform(-0.4, 0.4))
    pixels = area * rng.uniform(0.5, 1.0)
    width, height = max(16, int((pixels * aspect) ** 0.5)), max(16, int((pixels / aspect) ** 0.5))
    tint = (rng.random() > 0.35) * int(rng.choice([70, 70, 256]))  # white, a light colour, any colour
    colour = tuple(int(255 - c) for c in rng.integers(0, max(1, tint), 3))
    canvas = Image.new("RGB", (width, height), colour)

    scale = min(width / picture.width, height / picture.height) * rng.uniform(0.65, 1.0)
    size = max(8, round(picture.width * scale)), max(8, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        picture = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    x = int(rng.integers(min(0, width - picture.width), max(0, width - picture.width) + 1))
    y = int(rng.integers(min(0, height - picture.height), max(0, height - picture.height) + 1))
    paste(canvas, picture, x, y)
    return canvas


class Pairs:
    """Random-access image-text pairs.

    Training: endless and augmented; index i shows concept i mod n, so consecutive indices never repeat an emoji.
    Held out: 180 pairs on plain white at the native aspect ratio, no augmentation.
    """

    def __init__(self, split_name: str, seed: int = 0):
        self.split, self.seed = split_name, seed
        self.indices = split(split_name)

    def __len__(self) -> int:
        return ENDLESS if self.split == "train" else len(self.indices)

    def __getitem__(self, i: int) -> Pair:
        e = load()[self.indices[i % len(self.indices)]]
        if self.split == "train":
            picture = augmented(e.index, generator(self.seed, "emoji", i))
        else:
            picture = plain(e.index)
        return Pair(id=e.id, image=picture, texts={lang: list(e.texts[lang]) for lang in LANGUAGES})
