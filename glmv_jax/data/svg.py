"""A rasteriser of a small subset of SVG, in NumPy: enough for shapes and icons, the same pixels on every machine.

    elements     svg (viewBox, fitted into the picture and centred), g, rect (rx, ry), circle, ellipse, line, polyline,
                 polygon, path
    paths        M L H V C S Q T Z in both cases; no arcs (A)
    attributes   fill, stroke, stroke-width, transform (translate, scale, rotate, matrix); also in `style`; inherited
    colours      CSS names, #rgb, #rrggbb, rgb(...), none

No text, gradients, clipping, opacity, style sheets, links or images: such elements draw nothing. Fills are nonzero,
joins are round, ends are flat.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageColor

from glmv_jax.data.svg_outlines import OUTLINES, Outline, arc, numbers_of, tag_of
from glmv_jax.typing import UserError

MOST = 64  # elements, of a drawing
MOST_POINTS = 1500  # of all outlines together
OVERSAMPLE = 4
INHERITED = ("fill", "stroke", "stroke-width")
_CALL = re.compile(r"([a-zA-Z]+)\s*\(([^()]*)\)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one element draws: outlines in pixels of the picture, colours or None, the width of the stroke in pixels."""

    tag: str
    outlines: tuple[Outline, ...]
    fill: tuple[int, int, int] | None
    stroke: tuple[int, int, int] | None
    width: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Around all outlines and half the stroke."""
        points = np.concatenate([points for points, _ in self.outlines])
        more = self.width / 2 if self.stroke else 0.0
        return (*(points.min(0) - more).tolist(), *(points.max(0) + more).tolist())


def shapes(code: str, size: tuple[int, int]) -> list[Shape]:
    """What an SVG draws in a picture of `size` (width, height), in the order of drawing.

    Raises UserError for what is no SVG, and for more than this reads: see the head of this file, MOST, MOST_POINTS.
    """
    if "<!" in code.replace("<!--", ""):
        raise UserError("an SVG with a document type or CDATA is not read; leave them out")
    try:
        root = ElementTree.fromstring(code)
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"this is no SVG ({error})") from None
    if tag_of(root) != "svg":
        raise UserError(f"the outermost element is {tag_of(root)!r}; make it svg")
    try:
        with np.errstate(all="ignore"):  # what overflows is refused
            return list(_walk(root, _fitted(root, size)))
    except (ValueError, OverflowError) as error:
        raise UserError(f"this SVG cannot be read: {error}") from None


def rasterise(code: str, size: tuple[int, int], paper: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """An SVG as an RGB picture of `size`. Raises as `shapes`."""
    return paint(shapes(code, size), size, paper)


def paint(drawn: list[Shape], size: tuple[int, int], paper: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Shapes over each other on a plain picture."""
    picture = Image.new("RGB", size, paper)
    for shape in drawn:
        inside = [points for points, _ in shape.outlines if len(points) > 2]
        for colour, outlines in ((shape.fill, inside), (shape.stroke, _stroked(shape))):
            if colour is not None and outlines:
                _cover(picture, colour, outlines)
    return picture


def _cover(picture: Image.Image, colour: tuple[int, int, int], outlines: list[np.ndarray]) -> None:
    """Paints what lies within closed outlines, by the nonzero rule, each pixel by how much of it does.

    Every sample row counts the edges that cross it, with their sense, left of each sample.
    """
    starts, ends = np.concatenate(outlines), np.concatenate([np.roll(points, -1, 0) for points in outlines])
    corner = np.clip(np.floor(starts.min(0)), 0, picture.size).astype(int)
    size = np.clip(np.ceil(starts.max(0)), 0, picture.size).astype(int) - corner
    if min(size) <= 0:
        return
    width, height = (size * OVERSAMPLE).tolist()
    starts, ends = ((points - corner) * OVERSAMPLE for points in (starts, ends))
    y_H = np.arange(height) + 0.5
    (x0, y0), (x1, y1) = starts.T[:, :, None], ends.T[:, :, None]
    edge, row = np.nonzero((y0 <= y_H) != (y1 <= y_H))
    x0, y0, x1, y1 = (value[edge, 0] for value in (x0, y0, x1, y1))
    x = x0 + (y_H[row] - y0) * (x1 - x0) / (y1 - y0)
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
    turns_HW = np.zeros((height, width + 1), np.int32)
    np.add.at(turns_HW, (row, column), np.where(y1 > y0, 1, -1))
    inside_HW = (np.cumsum(turns_HW, axis=1)[:, :width] != 0).astype(np.uint8) * 255
    mask = Image.fromarray(inside_HW).resize(tuple(size.tolist()), Image.Resampling.BOX)
    picture.paste(colour, tuple(corner.tolist()), mask)


def _stroked(shape: Shape) -> list[np.ndarray]:
    """The stroke as outlines that all turn the same way: a rectangle a segment, a disc a corner."""
    outlines: list[np.ndarray] = []
    if shape.stroke is None:
        return outlines
    for points, closed in shape.outlines:
        ring = np.concatenate([points, points[:1]]) if closed else points
        ring, steps = ring[:-1], np.diff(ring, axis=0)
        lengths = np.linalg.norm(steps, axis=1)
        for start, step, length in zip(ring[lengths > 0], steps[lengths > 0], lengths[lengths > 0]):
            aside = np.array([-step[1], step[0]]) / length * shape.width / 2
            outlines.append(np.array([start + aside, start - aside, start + step - aside, start + step + aside]))
        corners = points if closed else points[1:-1]
        disc = arc(0.0, 0.0, shape.width / 2, shape.width / 2, 0.0, 2 * math.pi * 11 / 12, 12)
        outlines += [corner + disc for corner in corners]
    return outlines


# --- reading ----------------------------------------------------------------------------------------------------------


def _fitted(root: ElementTree.Element, size: tuple[int, int]) -> np.ndarray:
    """The 2 x 3 matrix from user units to pixels: the view box fitted into the picture and centred."""
    box = numbers_of(root.get("viewBox", ""))
    if root.get("viewBox") is None:
        given = [(numbers_of(root.get(side, "")) or [side_px])[0] for side, side_px in zip(("width", "height"), size)]
        box = [0.0, 0.0, *given]
    if len(box) != 4 or min(box[2:]) <= 0:
        raise ValueError("its view box has no size")
    scale = min(size[0] / box[2], size[1] / box[3])
    x, y = (size[0] - scale * box[2]) / 2 - scale * box[0], (size[1] - scale * box[3]) / 2 - scale * box[1]
    return np.array([[scale, 0, x], [0, scale, y]])


def _walk(root: ElementTree.Element, matrix: np.ndarray) -> Iterator[Shape]:
    """The shapes of a tree, depth first, with an own stack: an answer may nest as deep as it likes."""
    stack = [(root, matrix, {"fill": "black", "stroke": "none", "stroke-width": "1"})]
    elements = points = 0
    while stack:
        element, matrix, inherited = stack.pop()
        elements += 1
        if elements > MOST:
            raise ValueError(f"it has more than {MOST} elements")
        own = {**inherited, **_own(element)}
        matrix = _transformed(matrix, element.get("transform", ""))
        tag = tag_of(element)
        if tag in ("svg", "g"):
            stack += [(child, matrix, own) for child in reversed(element)]
        elif tag in OUTLINES:
            outlines = tuple((_moved(o, matrix), closed) for o, closed in OUTLINES[tag](element) if len(o) > 1)
            points += sum(len(o) for o, _ in outlines)
            if points > MOST_POINTS:
                raise ValueError(f"its outlines have more than {MOST_POINTS} points")
            fill, stroke = (_colour(own[name]) for name in ("fill", "stroke"))
            width = (numbers_of(own["stroke-width"]) or [1.0])[0] * math.sqrt(abs(np.linalg.det(matrix[:, :2])))
            fill = None if tag == "line" else fill
            stroke = stroke if width > 0 else None
            if outlines and (fill is not None or stroke is not None):
                yield Shape(tag, outlines, fill, stroke, min(width, 1e3))


def _own(element: ElementTree.Element) -> dict[str, str]:
    """The inherited attributes that an element says itself, those of `style` before others."""
    own = {name: value for name in INHERITED if (value := element.get(name))}
    for part in element.get("style", "").split(";"):
        name, _, value = part.partition(":")
        if name.strip() in INHERITED:
            own[name.strip()] = value.strip()
    return own


def _colour(name: str) -> tuple[int, int, int] | None:
    if name in ("none", "transparent"):
        return None
    return ImageColor.getrgb("black" if name == "currentColor" else name)[:3]


def _moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points under a matrix, kept near any picture: Pillow counts in 32 bits."""
    return np.clip(points @ matrix[:, :2].T + matrix[:, 2], -1e4, 1e4)


def _transformed(matrix: np.ndarray, text: str) -> np.ndarray:
    for name, inner in _CALL.findall(text):
        given = numbers_of(inner)
        if name == "translate" and given:
            step = np.array([[1, 0, given[0]], [0, 1, (given + [0.0])[1]]])
        elif name == "scale" and given:
            step = np.array([[given[0], 0, 0], [0, given[-1], 0]])
        elif name == "rotate" and len(given) in (1, 3):
            cos, sin = math.cos(math.radians(given[0])), math.sin(math.radians(given[0]))
            x, y = given[1:] or (0.0, 0.0)
            step = np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
        elif name == "matrix" and len(given) == 6:
            step = np.array([given[0::2], given[1::2]])
        else:
            raise ValueError(f"transform {name!r} is not read")
        matrix = np.concatenate([matrix[:, :2] @ step[:, :2], matrix[:, :2] @ step[:, 2:] + matrix[:, 2:]], axis=1)
    if not np.isfinite(matrix).all():
        raise ValueError("its transforms leave all bounds")
    return matrix
