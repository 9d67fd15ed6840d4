"""FLOPs of convolutions, as TPUs write products, against loops over every position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from glmv_jax.aot import flops


def by_hand(left, right, out, stride, low, between, apart) -> int:
    """Pairs of window and output positions of one dimension that meet an element of the input."""
    elements = {i * between for i in range(left)}
    return sum(o * stride + k * apart - low in elements for k, o in itertools.product(range(right), range(out)))


def test_positions_that_meet_the_input():
    rng = np.random.default_rng(0)
    met = 0
    for _ in range(300):
        left, right = (int(n) for n in rng.integers(1, 9, 2))
        stride, between, apart = (int(n) for n in rng.integers(1, 5, 3))
        low, out = int(rng.integers(0, 6)), int(rng.integers(1, 12))
        found = flops._places(left, right, out, stride, low, between, apart)
        assert found == by_hand(left, right, out, stride, low, between, apart)
        met += found > 0
    assert met > 200


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "expected"),
    [
        # A plain product, [128, 64] x [64, 32].
        ((128, 64), (64, 32), (128, 32), "dim_labels=bf_io->bf", 2 * 128 * 64 * 32),
        # Eight products at once: the batch is a window dimension, dilated so that each meets its own.
        ((8, 128, 64), (8, 64, 32), (8, 128, 32),
         "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf", 8 * 2 * 128 * 64 * 32),
        # An image of 3 channels under 14 x 14 patches.
        ((2, 224, 224, 3), (14, 14, 3, 64), (2, 16, 16, 64),
         "window={size=14x14 stride=14x14}, dim_labels=b01f_01io->b01f", 2 * 2 * 16 * 16 * 64 * 14 * 14 * 3),
        # The same by groups of channels: each output reads one.
        ((2, 8, 6), (3, 1, 6), (2, 8, 6),
         "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f, feature_group_count=6", 2 * 2 * 6 * (3 * 8 - 2)),
    ],
)  # fmt: skip
def test_convolution(left, right, out, attributes, expected):
    assert flops.convolution(left, right, out, attributes) == expected


def test_a_convolution_that_is_spelt_otherwise_is_not_counted_as_something_else():
    with pytest.raises(ValueError, match="without dim_labels"):
        flops.convolution((2, 3), (3, 4), (2, 4), "window={size=1}")
