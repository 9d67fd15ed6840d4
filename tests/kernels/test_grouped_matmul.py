"""Products by group against float64 loops, and how much arithmetic they take. Not covered: Megablox on a TPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import grouped_matmul as lib

SIZES = [[5, 0, 17, 1, 9], [0, 0, 0, 0, 0], [0, 0, 40, 0, 0], [8, 8, 8, 8, 8], [1, 0, 0, 0, 2]]


def inputs(sizes: list[int], M: int = 40, K: int = 6, N: int = 7):
    rng = np.random.default_rng(sum(sizes))
    x, w, g = rng.normal(size=(M, K)), rng.normal(size=(len(sizes), K, N)), rng.normal(size=(M, N))
    return x, w, g


def by_loop(x, w, g, sizes):
    """(y, dx, dw) in float64, a row at a time."""
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    for r, e in enumerate(group_of):
        y[r], dx[r] = x[r] @ w[e], g[r] @ w[e].T
        dw[e] += np.outer(x[r], g[r])
    return y, dx, dw


@pytest.mark.parametrize("form", ["tiled", "plain"])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_a_loop_over_rows(form, sizes):
    x, w, g = inputs(sizes)
    f32 = [jnp.array(a, jnp.float32) for a in (x, w, g)]
    product = lib.plain if form == "plain" else functools.partial(lib.tiled, rows=8)
    y, pull = jax.vjp(lambda x, w: product(x, w, jnp.array(sizes, jnp.int32)), *f32[:2])
    for got, want in zip((y, *pull(f32[2])), by_loop(x, w, g, sizes)):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_megablox_in_the_interpreter():
    """Its own path, a group without rows and rows after the last group included."""
    sizes = [70, 0, 100]
    x, w, g = inputs(sizes, M=256, K=128, N=128)
    f32 = [jnp.array(a, jnp.float32) for a in (x, w, g)]
    y, pull = jax.vjp(lambda x, w: lib.megablox(x, w, jnp.array(sizes, jnp.int32), interpret=True), *f32[:2])
    for got, want in zip((y, *pull(f32[2])), by_loop(x, w, g, sizes)):
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_megablox_leaves_the_rest_alone():
    """What lies in rows after the last group gets into no other, nor into an expert's gradient."""
    sizes = [70, 0, 100]
    x, w, g = inputs(sizes, M=256, K=128, N=128)
    want = by_loop(x, w, g, sizes)
    x[170:] = g[170:] = np.nan
    f32 = [jnp.array(a, jnp.float32) for a in (x, w, g)]
    product = functools.partial(lib.megablox, sizes_G=jnp.array(sizes, jnp.int32), rest=False, interpret=True)
    y, pull = jax.vjp(product, *f32[:2])
    dx, dw = pull(f32[2])
    for got, right in zip((y[:170], dx[:170], dw), (want[0][:170], want[1][:170], want[2])):
        np.testing.assert_allclose(got, right, atol=1e-3)


def test_half_precision_sums_weight_gradients_in_float32():
    sizes = [300, 0, 212]
    x, w, g = inputs(sizes, M=512)
    half = [jnp.array(a, jnp.bfloat16) for a in (x, w, g)]
    y, pull = jax.vjp(lambda x, w: lib.tiled(x, w, jnp.array(sizes, jnp.int32), 32), half[0], jnp.array(w, jnp.float32))
    dx, dw = pull(half[2])
    assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    _, _, want = by_loop(*(np.asarray(a, np.float64) for a in half), sizes)
    np.testing.assert_allclose(dw, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows, experts", [(2048, 8), (16384, 32), (65536, 256)])
def test_backward_does_at_most_a_tenth_more_than_ideal(rows, experts):
    """Counted as the loop counts: tiles times their rows, with sizes as a random router makes them."""
    sizes = np.random.default_rng(0).multinomial(rows, np.random.default_rng(1).dirichlet(np.full(experts, 20.0)))
    tile = lib.tile_rows(rows, experts)
    count, _ = lib._tiles(jnp.array(sizes, jnp.int32), tile)
    assert int(count) * tile <= 1.1 * rows


def test_one_loop_a_product():
    """The program holds one product of a tile, and the gradient two more: nothing is multiplied with every group."""
    x, w, g = (jnp.array(a, jnp.float32) for a in inputs(SIZES[0]))
    sizes = jnp.array(SIZES[0], jnp.int32)

    def both(x, w, g):
        y, pull = jax.vjp(lambda x, w: lib.grouped_matmul(x, w, sizes), x, w)
        return y, pull(g)

    text = jax.jit(both).lower(x, w, g).as_text()
    assert text.count("stablehlo.dot_general") == 3
    tile = lib.tile_rows(*x.shape[:1], len(w))
    assert all(f"tensor<{tile}x" in line for line in text.splitlines() if "stablehlo.dot_general" in line)
