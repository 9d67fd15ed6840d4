"""Outlines of the elements of an SVG, in user units: what `svg` fills and strokes."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np

_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,9}\.?[0-9]{0,9}|\.[0-9]{1,9})(?:[eE][-+]?[0-9])?")
_COMMAND = re.compile(r"([A-Za-z])([^A-DF-Za-df-z]*)")
_ARGUMENTS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "Z": 0}

Outline = tuple[np.ndarray, bool]  # points [N, 2] and whether it is closed


def tag_of(element: ElementTree.Element) -> str:
    """The name of an element without its namespace, "" for what is none."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def numbers_of(text: str) -> list[float]:
    """All numbers of a text, however they are separated: "10-5.5.5" is 10, -5.5, 0.5."""
    return [float(n) for n in _NUMBER.findall(text)]


def _attributes(element: ElementTree.Element, *names: str) -> list[float]:
    if any("%" in element.get(name, "") for name in names):
        raise ValueError("percentages are not read; use user units")
    return [(numbers_of(element.get(name, "")) or [0.0])[0] for name in names]


def arc(
    cx: float, cy: float, rx: float, ry: float, start: float = 0.0, turn: float = 2 * math.pi, steps: int = 65
) -> np.ndarray:
    """Points of an ellipse [steps, 2] from an angle on, clockwise on a page; without more the whole of it."""
    angles = start + np.linspace(0.0, turn, steps)
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1)


def _rect(element: ElementTree.Element) -> list[Outline]:
    x, y, width, height, rx, ry = _attributes(element, "x", "y", "width", "height", "rx", "ry")
    if width <= 0 or height <= 0:
        return []
    rx, ry = min(rx or ry, width / 2), min(ry or rx, height / 2)
    if rx <= 0 or ry <= 0:
        return [(np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]]), True)]
    corners = [(x + width - rx, y + ry, -1), (x + width - rx, y + height - ry, 0), (x + rx, y + height - ry, 1),
               (x + rx, y + ry, 2)]  # fmt: skip
    quarter = math.pi / 2
    return [(np.concatenate([arc(cx, cy, rx, ry, n * quarter, quarter, 17) for cx, cy, n in corners]), True)]


def _ellipse(element: ElementTree.Element) -> list[Outline]:
    cx, cy, rx, ry, r = _attributes(element, "cx", "cy", "rx", "ry", "r")
    rx, ry = (r, r) if tag_of(element) == "circle" else (rx, ry)
    return [(arc(cx, cy, rx, ry), True)] if rx > 0 and ry > 0 else []


def _line(element: ElementTree.Element) -> list[Outline]:
    return [(np.array(_attributes(element, "x1", "y1", "x2", "y2")).reshape(2, 2), False)]


def _points(element: ElementTree.Element) -> list[Outline]:
    numbers = numbers_of(element.get("points", ""))
    return [(np.array(numbers[: len(numbers) // 2 * 2]).reshape(-1, 2), tag_of(element) == "polygon")]


def _path(element: ElementTree.Element) -> list[Outline]:
    """Subpaths as outlines. ValueError for arcs and for what is no path."""
    outlines: list[Outline] = []
    points: list[np.ndarray] = []  # of the subpath under way
    here, control, last = np.zeros(2), np.zeros(2), ""
    for letter, inner in _COMMAND.findall(element.get("d", "")):
        kind, numbers = letter.upper(), numbers_of(inner)
        each = _ARGUMENTS.get(kind, -1)
        if each < 0 or (len(numbers) % each or not numbers if each else numbers) or (not points and kind != "M"):
            raise ValueError(f"the path command {letter!r} is not read, not here or not with {len(numbers)} numbers")
        if kind == "Z":
            outlines.append((np.array(points), True))
            here, points, last = points[0], points[:1], kind
            continue
        for n in range(0, len(numbers), each):
            given = np.array(numbers[n : n + each])
            more, control = _segment(kind, given, here if letter.islower() else np.zeros(2), here, control, last)
            if kind == "M" and n == 0:
                outlines += [(np.array(points), False)] if len(points) > 1 else []
                points = []
            points += more
            here, last = points[-1], kind
    return [*outlines, (np.array(points), False)] if len(points) > 1 else outlines


def _segment(
    kind: Any, given: Any, origin: Any, here: Any, control: Any, last: Any
) -> tuple[list[np.ndarray], np.ndarray]:
    """(points after `here`, the last control point) of one command; curves in 16 steps."""
    if kind in "HV":
        axis, end = int(kind == "V"), here.copy()
        end[axis] = origin[axis] + given[0]
        return [end], end
    corners = list(origin + given.reshape(-1, 2))
    if kind in "ML":
        return corners, corners[-1]
    if kind in "ST":  # the first control point mirrors the last one of the curve before
        corners.insert(0, 2 * here - control if last and last in {"S": "CS", "T": "QT"}[kind] else here)
    t_N1 = np.linspace(0, 1, 17)[1:, None]
    curve = [here + 0 * t_N1, *corners]
    while len(curve) > 1:  # de Casteljau
        curve = [(1 - t_N1) * a + t_N1 * b for a, b in zip(curve, curve[1:])]
    return list(curve[0]), corners[-2]


# tag -> element -> its outlines
OUTLINES = {"rect": _rect, "circle": _ellipse, "ellipse": _ellipse, "line": _line, "polyline": _points,
             "polygon": _points, "path": _path}  # fmt: skip
