"""The three image sources of stage 1, endless and random-access: `natural`, `instruction`, `scientific`.

natural:     crops of photographs; emoji on a photograph or on a plain colour.
instruction: rendered pages and windows, crops of scanned pages.
scientific:  charts of known data; crops of microscopy and astronomy photographs.

Item i is (id, PIL RGB of 64x64) and depends on (seed, split, i) alone. The loader augments (crops, mirrors) after this.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from glmv_jax.data import charts, documents, emoji, photos
from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.typing import UserError

SIDE = 64


def natural(rng: np.random.Generator, split: str) -> Image.Image:
    names = photos.FILES["natural", split]
    form = rng.random()
    if form < 0.4:
        return photos.crop(names[int(rng.integers(len(names)))], rng, SIDE)
    if form < 0.7:
        picture = photos.crop(names[int(rng.integers(len(names)))], rng, SIDE)
    else:
        picture = Image.new("RGB", (SIDE, SIDE), tuple(int(c) for c in rng.integers(0, 256, 3)))
    indices = emoji.split(split)
    for _ in range(int(rng.integers(1, 4))):
        stamp = emoji.stamp(indices[int(rng.integers(len(indices)))], 4 * int(rng.integers(5, 15)))
        x = int(rng.integers(-stamp.width // 4, SIDE - stamp.width * 3 // 4 + 1))
        y = int(rng.integers(-stamp.height // 4, SIDE - stamp.height * 3 // 4 + 1))
        emoji.paste(picture, stamp, x, y)
    return picture


def instruction(rng: np.random.Generator, split: str) -> Image.Image:
    form = rng.random()
    if form < 0.15:
        names = photos.FILES["page", split]
        return photos.crop(names[int(rng.integers(len(names)))], rng, SIDE)
    side = int(rng.integers(64, 129))
    drawn = (documents.page if form < 0.55 else documents.panel)(rng, split, (side, side))
    return drawn.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0) if side != SIDE else drawn


def scientific(rng: np.random.Generator, split: str) -> Image.Image:
    if rng.random() < 0.5:
        names = photos.FILES["scientific", split]
        return photos.crop(names[int(rng.integers(len(names)))], rng, SIDE)
    return charts.draw(rng, split, (SIDE, SIDE))[0]


KINDS: dict[str, Callable[[np.random.Generator, str], Image.Image]] = {
    "natural": natural,
    "instruction": instruction,
    "scientific": scientific,
}


class Images:
    """Endless random access to one of the three sources.

    Args:
      kind: "natural", "instruction" or "scientific".
      split: "train" or "heldout": other photographs, emoji concepts, fonts, shades and seeds.
    Raises:
      UserError: an unknown kind or split.
    """

    def __init__(self, kind: str, split: str, seed: int = 0):
        if kind not in KINDS or split not in ("train", "heldout"):
            raise UserError(f"image source {kind}/{split} does not exist; use {', '.join(KINDS)} with train or heldout")
        self.kind, self.split, self.seed = kind, split, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> tuple[str, Image.Image]:
        rng = generator(self.seed, self.split, self.kind, i)
        return f"{self.kind}/{self.split}/{i}", KINDS[self.kind](rng, self.split)
