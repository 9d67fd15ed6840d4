"""Rules' parts for answers that are drawn: how near a picture is to another one, and its parts to the other's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from glmv_jax.data import coordinates
from glmv_jax.rl.rewards.geometry import match

Part = TypeVar("Part")
FAR = 128.0  # mean absolute difference of two colours that have nothing in common


def closeness(found: Image.Image, gold: Image.Image) -> float:
    """1 - error / error of the best plain picture, in [0, 1], where the error is the mean absolute difference.

    So every picture of one colour gets 0, however much of the gold is background; a missing thing costs its share of
    all that is not background. The best plain picture has the median of each channel. Sizes must be equal, and a gold
    of one colour has nothing to be near to: ValueError.
    """
    if found.size != gold.size:
        raise ValueError(f"pictures of {found.size} and {gold.size} pixels are not compared")
    a, b = (np.asarray(each.convert("RGB"), np.float64) for each in (found, gold))
    plain = np.abs(b - np.median(b, axis=(0, 1))).mean()
    if plain == 0:
        raise ValueError("the gold picture is of one colour")
    return float(max(0.0, 1.0 - np.abs(a - b).mean() / plain))


def alike(a: Sequence[int] | None, b: Sequence[int] | None) -> float:
    """How alike two colours are, in [0, 1]; None is no colour, like only itself."""
    if a is None or b is None:
        return float(a is b)
    return max(0.0, 1.0 - float(np.abs(np.subtract(a, b, dtype=np.float64)).mean()) / FAR)


def structure(
    found: Sequence[Part],
    gold: Sequence[Part],
    box: Callable[[Part], Sequence[float]],
    same: Callable[[Part, Part], float],
) -> float:
    """One-to-one agreement of parts, in [0, 1]: the sum of IoU * `same` over pairs, over the larger number of parts.

    box: of a part, in pixels. same: how alike two parts are apart from their place, in [0, 1].
    """
    if not found or not gold:
        return 0.0
    score_NM = coordinates.iou_matrix(np.array([box(p) for p in found]), np.array([box(p) for p in gold]))
    for n, m in np.argwhere(score_NM > 0):
        score_NM[n, m] *= same(found[n], gold[m])
    return sum(float(score_NM[pair]) for pair in match(score_NM)) / max(len(found), len(gold))
