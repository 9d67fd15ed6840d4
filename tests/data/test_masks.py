"""Stage-1 masks: the exact count always, blocks that are blocks, and the order of a vision row."""

from __future__ import annotations

import numpy as np
import pytest

from glmv_jax.data import masks, naflex
from glmv_jax.typing import UserError


def test_paper_ratio_at_paper_grid():
    assert masks.count_for(0.35, 16, 16) == 90


@pytest.mark.parametrize("generate", [masks.blockwise, masks.random])
@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (4, 14), (2, 2), (1, 30), (24, 6)])
def test_exact_count_on_any_grid(generate, grid):
    for ratio in (0.0, 0.35, 0.75, 1.0):
        count = masks.count_for(ratio, *grid)
        for seed in range(20):
            mask = generate(np.random.default_rng(seed), *grid, count)
            assert mask.shape == grid and mask.dtype == bool and mask.sum() == count


def _boundary(mask_HW: np.ndarray) -> int:
    """Edges between a masked and a visible patch."""
    return int((mask_HW[1:] != mask_HW[:-1]).sum() + (mask_HW[:, 1:] != mask_HW[:, :-1]).sum())


def test_blocks_have_far_shorter_boundaries_than_random_masks():
    rng = np.random.default_rng(0)
    blocks = np.mean([_boundary(masks.blockwise(rng, 16, 16, 90)) for _ in range(100)])
    anywhere = np.mean([_boundary(masks.random(rng, 16, 16, 90)) for _ in range(100)])
    assert blocks < 0.25 * anywhere


def test_every_patch_is_masked_sometimes_and_masks_differ():
    rng = np.random.default_rng(0)
    mean = np.mean([masks.blockwise(rng, 16, 16, 90) for _ in range(400)], 0)
    assert 0.01 < mean.min() < mean.max() < 0.75  # the corners least: a block must lie inside the grid
    assert abs(mean.mean() - 90 / 256) < 1e-9


def test_same_seed_same_mask():
    one, two = (masks.blockwise(np.random.default_rng(5), 16, 16, 90) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_row_order_follows_the_patches():
    mask = masks.blockwise(np.random.default_rng(3), 4, 6, 9)
    yx = naflex.grid_coordinates(4, 6, 2)
    in_row = masks.in_row_order(mask, yx)
    # The 2x2 blocks one after the other, each row by row: written out by hand.
    expected = [mask[2 * by + y, 2 * bx + x] for by in range(2) for bx in range(3) for y in range(2) for x in range(2)]
    np.testing.assert_array_equal(in_row, expected)


def test_impossible_counts_are_a_user_error():
    for count in (-1, 17):
        with pytest.raises(UserError, match="cannot mask"):
            masks.blockwise(np.random.default_rng(0), 4, 4, count)
