"""Photographs that scikit-image bundles in its wheel (never those it downloads), cut into random crops.

Natural photographs, scientific ones (microscopy, astronomy, retina), and scanned pages. Whole photographs are held out,
not crops: a held-out crop shows a thing that no training crop showed.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import numpy as np
from PIL import Image

from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.typing import UserError

FILES = {
    ("natural", "train"): (
        "astronaut.png", "camera.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "clock_motion.png",
        "grass.png", "brick.png",
    ),
    ("natural", "heldout"): ("coffee.png", "gravel.png"),
    ("scientific", "train"): ("cell.png", "hubble_deep_field.jpg", "retina.jpg", "phantom.png"),
    ("scientific", "heldout"): ("ihc.png", "moon.png"),
    ("page", "train"): ("page.png",),
    ("page", "heldout"): ("text.png",),
}  # fmt: skip
PAGES = FILES["page", "train"] + FILES["page", "heldout"]


@functools.cache
def folder() -> pathlib.Path:
    """Where the installed scikit-image keeps its pictures; found without importing it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("scikit-image is missing, whose photographs are part of the corpus; pip install scikit-image")
    return pathlib.Path(spec.submodule_search_locations[0]) / "data"


@functools.cache
def load(name: str) -> Image.Image:
    """A bundled photograph as RGB, longest side at most 512. Shared, do not write to it."""
    file = folder() / name
    if not file.exists():
        raise UserError(f"this scikit-image does not bundle {name}; pip install 'scikit-image>=0.25'")
    photo = Image.open(file).convert("RGB")
    photo.thumbnail((512, 512), Image.Resampling.LANCZOS)
    return photo


def crop(name: str, rng: np.random.Generator, side: int = 64) -> Image.Image:
    """A random resized crop: 4 to 60 % of the photograph, aspect ratio 3:4 to 4:3; mirrored at random unless a page."""
    photo = load(name)
    area = photo.width * photo.height * rng.uniform(0.04, 0.6)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width = min(photo.width, max(16.0, (area * aspect) ** 0.5))
    height = min(photo.height, max(16.0, (area / aspect) ** 0.5))
    x, y = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    piece = photo.resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + width, y + height), reducing_gap=2.0)
    if name not in PAGES and rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return piece


class Crops:
    """Endless random access to crops of one kind of photograph ("natural", "scientific", "page")."""

    def __init__(self, split: str, seed: int = 0, kind: str = "natural", side: int = 64):
        if (kind, split) not in FILES:
            known = ", ".join("/".join(key) for key in FILES)
            raise UserError(f"photographs {kind}/{split} do not exist; use one of {known}")
        self.names, self.split, self.seed, self.kind, self.side = FILES[kind, split], split, seed, kind, side

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Image.Image:
        rng = generator(self.seed, self.split, "photo", self.kind, i)
        return crop(self.names[int(rng.integers(len(self.names)))], rng, self.side)
