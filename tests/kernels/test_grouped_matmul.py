"""Products by group against float64 loops, and how much arithmetic they take. Not covered: the kernels on a TPU."""

from __future__ import annotations

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
    ends = jnp.array(sizes, jnp.int32)
    forms = {"plain": lambda x, w: lib.plain(x, (w,), ends)[0], "tiled": lambda x, w: lib.tiled(x, w, ends, 8)}
    y, pull = jax.vjp(forms[form], *f32[:2])
    for got, want in zip((y, *pull(f32[2])), by_loop(x, w, g, sizes)):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_kernels_in_the_interpreter():
    """Its own path, a group without rows and rows after the last group included."""
    sizes = [70, 0, 100]
    x, w, g = inputs(sizes, M=256, K=128, N=128)
    f32 = [jnp.array(a, jnp.float32) for a in (x, w, g)]
    ends = jnp.array(sizes, jnp.int32)
    y, pull = jax.vjp(lambda x, w: lib.kernels(x, (w,), ends, 170, interpret=True)[0], *f32[:2])
    for got, want in zip((y, *pull(f32[2])), by_loop(x, w, g, sizes)):
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_kernels_of_two_stacks_sum_the_gradient_of_what_they_share():
    sizes = [200, 0, 100, 84]  # groups end within tiles and at the end of one; several blocks of both widths
    x, w, g = inputs(sizes, M=384, K=256, N=128)
    other, g_other = w[::-1] + 1, g[::-1] - 1
    f32 = [jnp.array(a, jnp.float32) for a in (x, w, other)]
    ends = jnp.array(sizes, jnp.int32)
    ys, pull = jax.vjp(lambda x, *ws: lib.kernels(x, ws, ends, 384, rest=False, interpret=True), *f32)
    dx, *dws = pull(tuple(jnp.array(a, jnp.float32) for a in (g, g_other)))
    one, two = by_loop(x, w, g, sizes), by_loop(x, other, g_other, sizes)
    for got, want in zip((*ys, dx, *dws), (one[0], two[0], one[1] + two[1], one[2], two[2])):
        np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("sizes", [[70, 0, 100, 86], [0, 256, 0], [1, 1, 1, 0], [0, 0], [128, 128]])
def test_visits(sizes, empty):
    """Every tile and group that share a row, in order; a tile of each empty group too, if asked."""
    found = lib.grouped_tiles.visits(jnp.array(sizes, jnp.int32), 256, 128, empty)
    count, ends = int(found.count), np.cumsum(sizes)
    want = [
        (t, e)
        for e, (end, n) in enumerate(zip(ends, sizes))
        for t in range(2)
        if max(end - n, 128 * t) < min(end, 128 * t + 128)
    ]
    got = [(t, e) for t, e in zip(found.tile.tolist()[:count], found.group.tolist()[:count]) if sizes[e]]
    assert got == want and found.ends.tolist() == [0, *ends]
    assert count == len(want) + empty * sizes.count(0) and found.group.tolist()[:count] == sorted(
        found.group.tolist()[:count]
    )
    assert 0 <= found.tile.min() and found.tile.max() < 2 and len(found.tile) >= count


def test_kernels_say_what_they_do_on_average():
    """The rows of their visits, whatever room there is: random loads of GLM-5's experts on a device."""
    rng, room, expected = np.random.default_rng(0), 81_920, 65_536
    tile = lib.grouped_tiles.tile_rows(room, 8, expected)
    loads = [jnp.array(rng.multinomial(expected, np.full(8, 1 / 8)), jnp.int32) for _ in range(4)]
    done = [int(lib.grouped_tiles.visits(sizes, room, tile, True).count) for sizes in loads]
    said = lib.grouped_tiles.estimate(expected, 8, tile, 6144, 2048, 0).flops / (2 * 6144 * 2048)
    assert np.mean(done) * tile <= said <= 1.005 * np.mean(done) * tile and said <= 1.1 * expected


def test_kernels_leave_the_rest_alone():
    """What lies in rows after the last group gets into no other, nor into an expert's gradient."""
    sizes = [70, 0, 100]
    x, w, g = inputs(sizes, M=256, K=128, N=128)
    want = by_loop(x, w, g, sizes)
    x[170:] = g[170:] = np.nan
    f32 = [jnp.array(a, jnp.float32) for a in (x, w, g)]
    ends = jnp.array(sizes, jnp.int32)
    y, pull = jax.vjp(lambda x, w: lib.kernels(x, (w,), ends, 170, rest=False, interpret=True)[0], *f32[:2])
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
        y, pull = jax.vjp(lambda x, w: lib.grouped_matmul(x, (w,), sizes)[0], x, w)
        return y, pull(g)

    text = jax.jit(both).lower(x, w, g).as_text()
    assert text.count("stablehlo.dot_general") == 3
    tile = lib.tile_rows(*x.shape[:1], len(w))
    assert all(f"tensor<{tile}x" in line for line in text.splitlines() if "stablehlo.dot_general" in line)
