"""Entries of a layer in a stack of all layers against the same ones in an array of its own, and loops in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import entries

L, B, S, X, T = 3, 4, 7, 5, 2
RNG = np.random.default_rng(0)
STACK = RNG.normal(size=(L, B, S, X)).astype(np.float32)


def both(layer: int = 1) -> tuple[jax.Array, entries.Place]:
    return jnp.array(STACK[layer]), entries.Place(jnp.array(STACK), jnp.int32(layer))


@pytest.mark.parametrize("slots", [[3], [0, 4, 5, 6], [5, 1, 9, 2]], ids=["one", "rows", "clipped"])
@pytest.mark.parametrize("width", [X, X - 2])
def test_write(slots, width):
    """In one layer alone; short entries end with zeros, and what would not fit is as far behind as fits."""
    new = RNG.normal(size=(B, T, width)).astype(np.float64)
    wanted = STACK.copy()
    for row in range(B):
        start = min(slots[row % len(slots)], S - T)
        wanted[1, row, start : start + T] = np.pad(new[row], ((0, 0), (0, X - width)))
    own, place = both()
    np.testing.assert_array_equal(entries.write(own, jnp.array(new), jnp.array(slots)), wanted[1])
    written = jax.jit(entries.write)(place, jnp.array(new), jnp.array(slots))
    np.testing.assert_array_equal(written.stack, wanted)
    np.testing.assert_array_equal(entries.read(written), wanted[1])


def test_take_and_put():
    own, place = both(2)
    at = RNG.integers(0, S, (B, 6))
    at[1, 2] = S + 3  # none: the last
    wanted = np.stack([STACK[2, row, np.minimum(at[row], S - 1)] for row in range(B)])
    for kept in (own, place):
        np.testing.assert_array_equal(entries.take(kept, jnp.array(at)), wanted)
        assert kept.shape == (B, S, X)
    np.testing.assert_array_equal(entries.put(own, -own), -STACK[2])
    np.testing.assert_array_equal(entries.put(place, -own).stack, np.concatenate([STACK[:2], -STACK[2:]]))


def test_width():
    assert [entries.width(n) for n in (24, 128, 129, 576, 640)] == [24, 128, 256, 640, 640]
