"""Masks of stage 1: exactly `count` patches of a grid, in blocks, so that every batch has the same static shape.

Blocks as in BEiT (EVA-02 `masking_generator.py`: area from a minimum to what is left, log-uniform aspect ratio 0.3 to
1/0.3, at most ten tries a block). That generator may stop short of the count, so the rest is drawn at random, as
DINOv3's `complete_mask_randomly` does. The minimum block, 16 patches of a 16x16 grid there, is 1/16 of the grid here.
"""

from __future__ import annotations

import math

import numpy as np

from glmv_jax.typing import UserError

MIN_ASPECT = 0.3
TRIES = 10


def count_for(ratio: float, height: int, width: int) -> int:
    """Masked patches for a ratio: 35 % of 16x16 is 90."""
    return round(ratio * height * width)


def random(rng: np.random.Generator, height: int, width: int, count: int) -> np.ndarray:
    """`count` patches anywhere. Returns bool [height, width]."""
    mask_HW = np.zeros((height, width), bool)
    return _complete(rng, mask_HW, _checked(count, height, width))


def blockwise(
    rng: np.random.Generator, height: int, width: int, count: int, min_block: int | None = None
) -> np.ndarray:
    """`count` patches in rectangles, completed at random to exactly `count`. Returns bool [height, width]."""
    mask_HW = np.zeros((height, width), bool)
    _checked(count, height, width)
    min_block = max(1, height * width // 16) if min_block is None else min_block
    left = count
    while left > 0:
        added = _add_block(rng, mask_HW, min_block, left)
        if not added:
            break
        left -= added
    return _complete(rng, mask_HW, count)


def _add_block(rng: np.random.Generator, mask_HW: np.ndarray, min_block: int, left: int) -> int:
    """Mask one rectangle with at most `left` new patches; returns how many were new (0 = no block found)."""
    height, width = mask_HW.shape
    for _ in range(TRIES):
        target = rng.uniform(min_block, max(min_block, left))
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, start = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        block = mask_HW[top:top + h, start:start + w]
        new = h * w - int(block.sum())
        if 0 < new <= left:
            block[:] = True
            return new
    return 0


def _complete(rng: np.random.Generator, mask_HW: np.ndarray, count: int) -> np.ndarray:
    free = np.flatnonzero(~mask_HW)
    missing = count - (mask_HW.size - len(free))
    mask_HW.flat[rng.choice(free, missing, replace=False)] = True
    return mask_HW


def _checked(count: int, height: int, width: int) -> int:
    if not 0 <= count <= height * width:
        raise UserError(f"cannot mask {count} of {height}x{width} patches; lower the mask ratio or enlarge the image")
    return count


def in_row_order(mask_HW: np.ndarray, yx_P2: np.ndarray) -> np.ndarray:
    """A mask in the order of a vision row's patches (`naflex.grid_coordinates`). Returns bool [P]."""
    return mask_HW[yx_P2[:, 0], yx_P2[:, 1]]
