"""What synthetic pictures are made of: named colours, named shapes, plain backgrounds. Everything cached is shared.

Training and held-out pictures never share a shade of a colour or a background; their names are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

RGB: TypeAlias = tuple[int, int, int]
OVERSAMPLE = 8


@dataclasses.dataclass(frozen=True)
class Colour:
    """A colour name in both languages and its shades by split."""

    names: dict[str, str]
    train: tuple[RGB, ...]
    heldout: tuple[RGB, ...]

    def shade(self, split: str, rng: np.random.Generator) -> RGB:
        shades = self.train if split == "train" else self.heldout
        return shades[int(rng.integers(len(shades)))]


COLOURS = {
    "red": Colour(
        {"en": "red", "zh": "红色"},
        train=((220, 20, 30), (235, 45, 40), (200, 10, 25)),
        heldout=((210, 35, 20), (226, 12, 48)),
    ),
    "orange": Colour(
        {"en": "orange", "zh": "橙色"},
        train=((255, 140, 0), (250, 128, 15), (255, 150, 30)),
        heldout=((246, 136, 26), (255, 132, 8)),
    ),
    "yellow": Colour(
        {"en": "yellow", "zh": "黄色"},
        train=((250, 215, 0), (255, 225, 40), (240, 205, 10)),
        heldout=((248, 220, 25), (255, 212, 15)),
    ),
    "green": Colour(
        {"en": "green", "zh": "绿色"},
        train=((20, 150, 50), (40, 175, 70), (0, 130, 60)),
        heldout=((30, 160, 30), (12, 142, 76)),
    ),
    "blue": Colour(
        {"en": "blue", "zh": "蓝色"},
        train=((20, 70, 220), (40, 100, 240), (10, 60, 190)),
        heldout=((30, 85, 205), (15, 95, 225)),
    ),
    "purple": Colour(
        {"en": "purple", "zh": "紫色"},
        train=((130, 30, 170), (150, 50, 190), (110, 20, 150)),
        heldout=((142, 40, 160), (120, 35, 185)),
    ),
    "pink": Colour(
        {"en": "pink", "zh": "粉色"},
        train=((255, 130, 180), (250, 150, 195), (255, 115, 170)),
        heldout=((252, 140, 172), (246, 124, 190)),
    ),
    "black": Colour(
        {"en": "black", "zh": "黑色"},
        train=((0, 0, 0), (25, 25, 25), (40, 40, 45)),
        heldout=((14, 14, 20), (33, 30, 30)),
    ),
}

BACKGROUNDS = {
    "train": ((255, 255, 255), (245, 245, 240), (235, 242, 250), (250, 240, 230), (232, 245, 233), (225, 225, 230)),
    "heldout": ((252, 252, 248), (240, 236, 246), (238, 247, 244), (228, 232, 238)),
}

SHAPES = {
    "circle": {"en": "circle", "zh": "圆形"},
    "square": {"en": "square", "zh": "方形"},
    "triangle": {"en": "triangle", "zh": "三角形"},
    "star": {"en": "star", "zh": "星形"},
    "heart": {"en": "heart", "zh": "心形"},
    "cross": {"en": "cross", "zh": "十字形"},
}


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius, angle = (1.0, 0.45)[i % 2], math.pi * (i / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]


POLYGONS = {
    "circle": [(math.cos(math.pi * i / 48), math.sin(math.pi * i / 48)) for i in range(96)],
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0, 1), (0.5, 0), (1, 1)],
    "star": _star(),
    "heart": _heart(),
    "cross": [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)],
}


@functools.lru_cache(maxsize=1024)
def mask(shape: str, side: int) -> Image.Image:
    """The shape as an "L" mask that fills a square of `side` pixels, edges smoothed."""
    points = np.array(POLYGONS[shape], np.float64)
    points = (points - points.min(0)) / np.ptp(points, axis=0) * (side * OVERSAMPLE - 1)
    large = Image.new("L", (side * OVERSAMPLE, side * OVERSAMPLE))
    ImageDraw.Draw(large).polygon([tuple(p) for p in points.tolist()], fill=255)
    return large.resize((side, side), Image.Resampling.BOX)


def background(split: str, rng: np.random.Generator) -> RGB:
    """A light plain colour of the split."""
    shades = BACKGROUNDS[split]
    return shades[int(rng.integers(len(shades)))]


def on_lattice(x: int, y: int, split: str) -> bool:
    """Whether an object of this split may have its corner at pixel (x, y).

    Held-out pictures take the corners with x + y divisible by 4, training pictures the others: positions of the two
    never coincide, and yet both cover the whole image.
    """
    return ((x + y) % 4 == 0) == (split == "heldout")


def snap(x: int, y: int, split: str, low: int, high: int) -> int:
    """The x in [low, high] nearest to `x` for which (x, y) is on the lattice of the split."""
    return min(range(low, high + 1), key=lambda a: (not on_lattice(a, y, split), abs(a - x)))
