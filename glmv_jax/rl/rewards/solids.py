"""Boxes in space: nine numbers each, their exact intersection over union, and the rule that pays it.

Camera coordinates in metres: x to the right, y down, z forward. A box is x, y, z of its centre, its sizes along its own
axes, and three angles in radians: roll about z, pitch about x, yaw about y, which turn it in the order pitch, yaw, roll
(R = Rz(roll) Ry(yaw) Rx(pitch)). An upright box has only a yaw.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.geometry import MAX_SHAPES, match
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score

NUMBERS = 9
GROUP = re.compile(r"\[([^\[\]]*)\]")
NUMBER = re.compile(r"[-+]?[0-9]{1,6}(?:\.[0-9]{1,6})?")
NEAR = 1e-9  # of the larger extent: what is this close to a plane lies on it
# Faces of the cube [-1/2, 1/2]**3 as indices of its corners, bit k of an index being the side along axis k.
FACES = ((0, 2, 6, 4), (1, 3, 7, 5), (0, 1, 5, 4), (2, 3, 7, 6), (0, 1, 3, 2), (4, 5, 7, 6))


def parse(content: str) -> list[tuple[float, ...]] | None:
    """Every box of an answer: brackets with nine numbers, "[[1.5,0,6,1,1,2,0,0,0.5]]" or as "bbox_3d" of JSON.

    None when a bracket that holds no other has anything else in it, a size is not positive, or there is no box.
    """
    boxes = []
    for inner in GROUP.findall(content):
        fields = [field.strip() for field in inner.split(",")]
        if len(fields) != NUMBERS or not all(map(NUMBER.fullmatch, fields)):
            return None
        boxes.append(tuple(map(float, fields)))
    return boxes if boxes and all(min(box[3:6]) > 0 for box in boxes) else None


def rotation(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """R = Rz(roll) Ry(yaw) Rx(pitch), float64 [3, 3]; its columns are the axes of the box."""
    (sr, cr), (sp, cp), (sy, cy) = ((math.sin(a), math.cos(a)) for a in (roll, pitch, yaw))
    z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return z @ y @ x


def corners(box: Sequence[float]) -> np.ndarray:
    """The eight corners, float64 [8, 3]; bit k of a row's number is the side along the box's axis k."""
    units_83 = np.array([[(i >> k & 1) - 0.5 for k in range(3)] for i in range(8)])
    return np.array(box[:3]) + (units_83 * box[3:6]) @ rotation(*box[6:]).T


def _clipped(faces: list[np.ndarray], normal: np.ndarray, offset: float, near: float) -> list[np.ndarray]:
    """The part of a convex solid (polygons [K, 3]) where normal . x <= offset, closed again by a face on the plane."""
    heights = [face @ normal - offset for face in faces]
    if max(h.max() for h in heights) <= near:
        return faces
    kept, rim = [], []
    for face, height in zip(faces, heights):
        points = []
        for a, b, p, q in zip(height, np.roll(height, -1), face, np.roll(face, -1, 0)):
            if a <= near:
                points.append(p)
                rim += [p] if a >= -near else []
            if (a < -near and b > near) or (a > near and b < -near):
                points.append(p + (q - p) * (a / (a - b)))
                rim.append(points[-1])
        if len(points) >= 3:
            kept.append(np.array(points))
    if kept and len(rim) >= 3:
        across = np.eye(3)[np.argmin(np.abs(normal))]
        u = np.cross(normal, across)
        from_middle = np.array(rim) - np.mean(rim, 0)
        angle = np.arctan2(from_middle @ np.cross(normal, u), from_middle @ u)
        kept.append(np.array(rim)[np.argsort(angle)])
    return kept


def _volume(faces: list[np.ndarray]) -> float:
    """Volume of a convex solid: the pyramids from a point inside over every triangle of every face."""
    if not faces:
        return 0.0
    inside = np.concatenate(faces).mean(0)
    fans = [np.linalg.det(np.stack([face[:1].repeat(len(face) - 2, 0), face[1:-1], face[2:]], 1) - inside)
            for face in faces]  # fmt: skip
    return float(sum(np.abs(fan).sum() for fan in fans) / 6)


def intersection(a: Sequence[float], b: Sequence[float]) -> float:
    """Volume that two boxes share, exactly: `a` cut by the six planes of `b`."""
    points, turn = corners(a), rotation(*b[6:])
    near = NEAR * max(*a[3:6], *b[3:6])
    faces = [points[list(face)] for face in FACES]
    for axis, extent in zip(turn.T, b[3:6]):
        middle = axis @ np.array(b[:3])
        for normal, offset in ((axis, middle + extent / 2), (-axis, extent / 2 - middle)):
            faces = _clipped(faces, normal, offset, near)
            if not faces:
                return 0.0
    return _volume(faces)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes of nine numbers with positive sizes, in [0, 1]."""
    inner = intersection(a, b)
    return min(1.0, inner / (math.prod(a[3:6]) + math.prod(b[3:6]) - inner))


def boxes(*, threshold: float = 0.5) -> Rule:
    """A rule for 3D grounding: the mean IoU of boxes paired with gold ones, over the larger of the two counts.

    Correct when every box is met with IoU >= threshold and none is left over. The value needs no correct format of
    angles: a box turned by half a turn, or with sides and yaw exchanged, is the same solid. Gold boxes are those of the
    gold answer.
    """

    def rule(content: str, sample: Sample) -> Score:
        golds, found = parse(sample.answer), parse(content)
        if not golds:
            raise ValueError(f"sample {sample.id}: the gold answer {sample.answer!r} holds no box in space")
        if not found or len(found) > MAX_SHAPES:
            return WRONG
        iou_NM = np.array([[iou(a, b) for b in golds] for a in found])
        paired = [float(iou_NM[pair]) for pair in match(iou_NM)]
        count = max(len(found), len(golds))
        # Rounding aside, a gold box against itself is 1.
        value = 1.0 if found == golds else sum(paired) / count
        return Score(value, sum(p >= threshold for p in paired) == count)

    return rule
