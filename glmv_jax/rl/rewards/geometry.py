"""Rules for answers that are boxes or points in the 0..999 convention of `data.coordinates`. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from glmv_jax.data import coordinates
from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score

# A model that prints boxes until its tokens run out is wrong whatever they are; this bounds the matching.
MAX_SHAPES = 64


def match(score_NM: np.ndarray) -> list[tuple[int, int]]:
    """One-to-one pairs (answer, gold), greedily by falling score, pairs of score 0 left out."""
    pairs, used_n, used_m = [], set(), set()
    order = np.dstack(np.unravel_index(np.argsort(-score_NM, axis=None, kind="stable"), score_NM.shape))[0]
    for n, m in order.tolist():
        if score_NM[n, m] > 0 and n not in used_n and m not in used_m:
            pairs.append((n, m))
            used_n.add(n)
            used_m.add(m)
    return pairs


def boxes(*, threshold: float = 0.5, graded: float = 0.5) -> Rule:
    """A rule for grounding: the boxes of the content against the gold boxes.

    hits = pairs with IoU >= threshold, divided by the larger of the two counts, so that a shower of boxes loses what
    it hits (GLM-V report, arXiv 2507.01006, section 5.2, has #(IoU > tau) / #boxes). The value is
    graded * mean IoU + (1 - graded) * hits; correct when every box is hit and none is left over.
    Gold boxes are parsed from the gold answer.
    """

    def rule(content: str, sample: Sample) -> Score:
        golds, found = coordinates.parse_boxes(sample.answer), coordinates.parse_boxes(content)
        if not golds:
            raise ValueError(f"sample {sample.id}: the gold answer {sample.answer!r} holds no box")
        if not found or len(found) > MAX_SHAPES:
            return WRONG
        iou_NM = coordinates.iou_matrix(np.array(found), np.array(golds))
        paired = [float(iou_NM[pair]) for pair in match(iou_NM)]
        count = max(len(found), len(golds))
        hits = sum(iou >= threshold for iou in paired) / count
        return Score(graded * sum(paired) / count + (1.0 - graded) * hits, hits == 1.0)

    return rule


def outside(point: Sequence[float], box: Sequence[float]) -> float:
    """Distance from a point to a box in thousandths of the image side; 0 inside."""
    dx = max(box[0] - point[0], 0.0, point[0] - box[2])
    dy = max(box[1] - point[1], 0.0, point[1] - box[3])
    return math.hypot(dx, dy)


def point(*, reach: float = 0.0, graded: float = 0.0) -> Rule:
    """A rule for pointing: correct when the one point of the content lies in a box of meta["boxes"], edges included.

    A miss may still earn up to `graded`, falling linearly to 0 at `reach` thousandths of the image side from the
    nearest box. Two points are wrong: an answer cannot be hedged.
    """

    def rule(content: str, sample: Sample) -> Score:
        golds = sample.meta["boxes"]
        found = coordinates.parse_points(content)
        if len(found) != 1:
            return WRONG
        distance = min(outside(found[0], box) for box in golds)
        if distance == 0.0:
            return Score(1.0, True)
        near = max(0.0, 1.0 - distance / reach) if reach > 0 else 0.0
        return Score(graded * near, False)

    return rule
