"""Reads a scene of coloured shapes back from its pixels, without the code that drew it."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image
from scipy import ndimage

# Nominal colours; the shades that are drawn are others.
PALETTE = {
    "red": (215, 30, 30), "orange": (252, 138, 15), "yellow": (246, 217, 15), "green": (25, 150, 55),
    "blue": (25, 80, 215), "purple": (130, 35, 170), "pink": (252, 132, 182), "black": (20, 20, 22),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    shape: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def foreground(picture: Image.Image, least: int = 1) -> np.ndarray:
    """[H, W] bool: differs from the corner pixel, which no object reaches."""
    pixels = np.asarray(picture, np.int32)
    return np.abs(pixels - pixels[0, 0]).sum(-1) >= least


def shape_of(solid: np.ndarray) -> str:
    """A shape by how much of its box it fills and where."""
    height, width = solid.shape
    fill = solid.mean()
    corners = solid[: height // 6 + 1, : width // 6 + 1].mean()
    bottom_corners = solid[-(height // 6) - 1 :, : width // 6 + 1].mean()
    flipped = (solid == solid[::-1]).mean()
    if fill > 0.95:
        return "square"
    if bottom_corners > 0.4 and corners < 0.2:
        return "triangle"
    if flipped > 0.9:
        return "circle" if fill > 0.68 else "cross"
    return "heart" if fill > 0.52 else "star"


def find(picture: Image.Image) -> list[Found]:
    """Every shape of the picture."""
    pixels = np.asarray(picture, np.int32)
    labels, count = ndimage.label(foreground(picture), np.ones((3, 3)))
    found = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        mine = labels[rows, columns] == i
        inside = ndimage.binary_erosion(mine, iterations=2)
        median = np.median(pixels[rows, columns][inside if inside.any() else mine], 0)
        colour = min(PALETTE, key=lambda name: np.abs(median - PALETTE[name]).sum())
        near = np.abs(pixels[rows, columns] - median).sum(-1) < np.abs(pixels[0, 0] - median).sum() / 2
        found.append(Found(shape_of(near & mine), colour, (columns.start, rows.start, columns.stop, rows.stop)))
    assert len(found) == count
    return found
