"""The one convention for coordinates: integers 0..999 relative to the image, x before y, (0, 0) the top left corner.

A box is [x1, y1, x2, y2], a point [x, y]. Text always carries a list of them, "[[x1,y1,x2,y2]]" or "[[x,y]]", as the
GLM-V models write them. Pixel coordinates are continuous: the right edge of an image of width W is x = W.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

SCALE = 1000
Box = tuple[float, float, float, float]
Point = tuple[float, float]

_GROUP = re.compile(r"[\[({<]([^\[\](){}<>]*)[\])}>]")
# A number that is not the tail of a name ("bbox_2d", "x1").
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?![\w])")


def encode(value: float, size: float) -> int:
    """Pixel coordinate -> 0..999. Values outside the image are clamped to its edge."""
    return min(SCALE - 1, max(0, round(SCALE * value / size)))


def decode(value: float, size: float) -> float:
    """0..999 (1000 is accepted) -> pixel coordinate."""
    return value / SCALE * size


def encode_box(box: Sequence[float], width: float, height: float) -> tuple[int, int, int, int]:
    """A pixel box -> the integers that are written."""
    x1, y1, x2, y2 = box
    return encode(x1, width), encode(y1, height), encode(x2, width), encode(y2, height)


def decode_box(box: Sequence[float], width: float, height: float) -> Box:
    """Written integers -> a pixel box."""
    x1, y1, x2, y2 = box
    return decode(x1, width), decode(y1, height), decode(x2, width), decode(y2, height)


def encode_point(point: Sequence[float], width: float, height: float) -> tuple[int, int]:
    """A pixel point -> the integers that are written."""
    return encode(point[0], width), encode(point[1], height)


def decode_point(point: Sequence[float], width: float, height: float) -> Point:
    """Written integers -> a pixel point."""
    return decode(point[0], width), decode(point[1], height)


def format_lists(rows: Iterable[Sequence[int]]) -> str:
    """Boxes or points -> "[[1,2,3,4],[5,6,7,8]]" without spaces (each space would be a token)."""
    return "[" + ",".join("[" + ",".join(str(int(v)) for v in row) + "]" for row in rows) + "]"


def parse_boxes(text: str) -> list[Box]:
    """Every box in a model's answer, corners sorted; numbers outside 0..1000 make that box invalid.

    Tolerant of what models write: any bracket style, "(x1,y1),(x2,y2)" corner pairs, JSON keys, a bare
    "x1, y1, x2, y2". Never raises; nothing found is [].
    """
    groups = _groups(text)
    boxes = [g for g in groups if len(g) == 4]
    if not boxes:
        corners = [g for g in groups if len(g) == 2]
        boxes = [a + b for a, b in zip(corners[::2], corners[1::2])]
    return [(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
            for x1, y1, x2, y2 in boxes if _inside((x1, y1, x2, y2))]


def parse_points(text: str) -> list[Point]:
    """Every point in a model's answer, as tolerant as `parse_boxes`. A box is not a point."""
    return [(g[0], g[1]) for g in _groups(text) if len(g) == 2 and _inside(g)]


def _groups(text: str) -> list[list[float]]:
    """The numbers of each innermost bracket; without any bracket that holds numbers, all numbers as one group."""
    groups = [[float(n) for n in _NUMBER.findall(inner)] for inner in _GROUP.findall(text)]
    groups = [g for g in groups if g]
    return groups or [[float(n) for n in _NUMBER.findall(text)]]


def _inside(values: Sequence[float]) -> bool:
    return all(0 <= v <= SCALE for v in values)


def area(box: Sequence[float]) -> float:
    """Area of a box; 0 for an empty or inverted one."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes in the same units; 0 when either is empty."""
    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - inner
    return inner / union if inner > 0 else 0.0


def iou_matrix(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """IoU of every box of `a` with every box of `b`, float64 [N, M]."""
    a = np.asarray(a_N4, np.float64).reshape(-1, 1, 4)
    b = np.asarray(b_M4, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inner = np.clip(sides, 0, None).prod(-1)
    union = sum(np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1) for box in (a, b)) - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=inner > 0)


def inside(point: Sequence[float], box: Sequence[float]) -> bool:
    """Whether a point lies in a box, edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]
