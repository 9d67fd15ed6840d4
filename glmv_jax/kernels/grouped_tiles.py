"""Rows times their groups' matrices in Pallas kernels for TPUs. A visit is a tile of rows and one group in it.

As in JAX's Megablox kernels a tile in which a group ends is visited once more for the next, and what lies behind the
last group is not visited. Here a block of a matrix has all that a row is multiplied with, and stays where it is while
the tiles of its group pass; and what a kernel tells the compiler that it costs is what it does on average: the rows
that are expected and a tile more a group. Megablox counts all the room that there is for rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glmv_jax.kernels.selected import Ref, dot, dot_t

LANES = 128  # widths and rows are whole ones
_ROWS = (256, 128)
_BLOCK = 16 << 20  # bytes of a matrix at a time, of which vector memory holds two
_SQUARE = 1024  # a block of a gradient: 512 multiply-adds for a number that is read
_VMEM = 64 << 20


class Visits(NamedTuple):
    """group, tile: int32 [V] of each visit; ends: int32 [G + 1], with a 0 in front; count: of the visits there are."""

    group: jax.Array
    tile: jax.Array
    ends: jax.Array
    count: jax.Array  # type: ignore[assignment]  # in place of a tuple's own, which nobody asks


Matrices = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped(x_MK: jax.Array, ws_GKN: Matrices, sizes_G: jax.Array, expected: int, interpret: bool = False) -> Matrices:
    """[M, N] of each w: row r of group g times w[g]. Rows after the last group are not written, nor their gradients.

    expected: rows of all groups on average, for the cost. interpret: by the interpreter, for tests elsewhere.
    """
    return tuple(_product((x_MK,), (w_GKN,), sizes_G, expected, interpret, transposed=False) for w_GKN in ws_GKN)


def _forward(x_MK: jax.Array, ws_GKN: Matrices, sizes_G: jax.Array, expected: int, interpret: bool) -> tuple:
    return grouped(x_MK, ws_GKN, sizes_G, expected, interpret), (x_MK, ws_GKN, sizes_G)


def _backward(expected: int, interpret: bool, saved: tuple, gs_MN: Matrices) -> tuple:
    x_MK, ws_GKN, sizes_G = saved
    dx_MK = _product(gs_MN, ws_GKN, sizes_G, expected, interpret, transposed=True)
    return dx_MK, tuple(_outer_products(x_MK, g_MN, sizes_G, expected, interpret) for g_MN in gs_MN), None


grouped.defvjp(_forward, _backward)


def tile_rows(rows: int, groups: int, expected: int) -> int:
    """Of a tile: a fifth of a group's at most, as one is visited twice where a group ends."""
    return next((n for n in _ROWS if n <= expected // (5 * groups) and rows % n == 0), _ROWS[-1])


def visits(sizes_G: jax.Array, rows: int, tile: int, empty: bool) -> Visits:
    """Of so many rows in such tiles. empty: groups without rows are visited too, to write their zeros."""
    G, last = len(sizes_G), rows // tile - 1
    ends_G = jnp.cumsum(sizes_G).astype(jnp.int32)
    first_G = (ends_G - sizes_G) // tile
    each_G = jnp.where(sizes_G > 0, (ends_G - 1) // tile - first_G + 1, int(empty))
    until_G = jnp.cumsum(each_G)
    at_V = jnp.arange(rows // tile + G, dtype=jnp.int32)
    group_V = jnp.minimum(jnp.searchsorted(until_G, at_V, side="right", method="compare_all"), G - 1).astype(jnp.int32)
    tile_V = jnp.clip((first_G + each_G - until_G)[group_V] + at_V, 0, last).astype(jnp.int32)
    return Visits(group_V, tile_V, jnp.pad(ends_G, (1, 0)), until_G[-1].astype(jnp.int32))


def estimate(expected: int, groups: int, tile: int, K: int, N: int, moved: float) -> pl.CostEstimate:
    """moved: bytes, of all that is read and written."""
    return pl.CostEstimate(flops=2 * (expected + groups * tile) * K * N, transcendentals=0, bytes_accessed=int(moved))


def _mine(v: jax.Array, group_V: Ref, tile_V: Ref, ends_G: Ref, shape: tuple[int, int]) -> jax.Array:
    """Which rows of a tile are of the group that it is visited for."""
    at = tile_V[v] * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (at >= ends_G[group_V[v]]) & (at < ends_G[group_V[v] + 1])


def _width(most: int, n: int) -> int:
    """The largest whole part of n in whole 128, of at most so many."""
    return max((w for w in range(LANES, n + 1, LANES) if n % w == 0 and w <= most), default=LANES)


def _product(
    xs_MK: Matrices, ws_GKN: Matrices, sizes_G: jax.Array, expected: int, interpret: bool, transposed: bool
) -> jax.Array:
    """[M, N], summed over pairs of rows and matrices."""
    (M, K), (G, *sides), count = xs_MK[0].shape, ws_GKN[0].shape, len(xs_MK)
    N, size = sides[0 if transposed else 1], xs_MK[0].dtype.itemsize
    rows, wide = tile_rows(M, G, expected), _width(min(_BLOCK // (K * size * count), _SQUARE), N)
    found = visits(sizes_G, M, rows, empty=False)

    def body(group_V: Ref, tile_V: Ref, ends_G: Ref, *refs: Ref) -> None:
        xs, ws, y = refs[:count], refs[count:-1], refs[-1]
        made: Any = sum((dot_t if transposed else dot)(x[...], w[...]) for x, w in zip(xs, ws))
        mine = _mine(pl.program_id(1), group_V, tile_V, ends_G, made.shape)
        y[...] = jnp.where(mine, made, y[...].astype(jnp.float32)).astype(y.dtype)

    block = (None, wide, K) if transposed else (None, K, wide)
    whole = lambda n, v, group_V: (group_V[v], n, 0) if transposed else (group_V[v], 0, n)  # noqa: E731
    x_spec = pl.BlockSpec((rows, K), lambda n, v, group_V, tile_V, _: (tile_V[v], 0))
    w_spec = pl.BlockSpec(block, lambda n, v, group_V, tile_V, _: whole(n, v, group_V))
    moved = (expected * (count * K * (N // wide) + N) + count * G * K * N) * size
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((M, N), xs_MK[0].dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(N // wide, found.count), in_specs=[x_spec] * count + [w_spec] * count,
            out_specs=pl.BlockSpec((rows, wide), lambda n, v, group_V, tile_V, _: (tile_V[v], n)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
        cost_estimate=estimate(expected, G, rows, count * K, N, moved), interpret=interpret,
        name="grouped_transposed" if transposed else "grouped_product",
    )(*found[:3], *xs_MK, *ws_GKN)  # fmt: skip


def _outer_products(x_MK: jax.Array, g_MN: jax.Array, sizes_G: jax.Array, expected: int, interpret: bool) -> jax.Array:
    """[G, K, N]: x^T g over the rows of each group, summed in float32."""
    (M, K), N, G = x_MK.shape, g_MN.shape[1], len(sizes_G)
    rows, tall, wide = tile_rows(M, G, expected), _width(_SQUARE, K), _width(_SQUARE, N)
    found = visits(sizes_G, M, rows, empty=True)

    def body(group_V: Ref, tile_V: Ref, ends_G: Ref, x: Ref, g: Ref, dw: Ref, acc: Ref) -> None:
        v, end = pl.program_id(2), pl.num_programs(2) - 1
        group = group_V[v]
        real = lambda r: jnp.where(  # noqa: E731
            _mine(v, group_V, tile_V, ends_G, r.shape), r[...].astype(jnp.float32), 0.0
        )

        @pl.when((v == 0) | (group_V[jnp.maximum(v - 1, 0)] != group))
        def _() -> None:
            acc[...] = jnp.zeros_like(acc)

        acc[...] += dot(real(x).T.astype(x.dtype), real(g).astype(g.dtype))

        @pl.when((v == end) | (group_V[jnp.minimum(v + 1, end)] != group))
        def _() -> None:
            dw[...] = acc[...].astype(dw.dtype)

    moved = (expected * (K * (N // wide) + N * (K // tall)) + G * K * N) * x_MK.dtype.itemsize
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((G, K, N), x_MK.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(K // tall, N // wide, found.count),
            in_specs=[pl.BlockSpec((rows, tall), lambda k, n, v, group_V, tile_V, _: (tile_V[v], k)),
                      pl.BlockSpec((rows, wide), lambda k, n, v, group_V, tile_V, _: (tile_V[v], n))],
            out_specs=pl.BlockSpec((None, tall, wide), lambda k, n, v, group_V, tile_V, _: (group_V[v], k, n)),
            scratch_shapes=[pltpu.VMEM((tall, wide), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=estimate(expected, G, rows, K, N, moved), interpret=interpret, name="grouped_outer",
    )(*found[:3], x_MK, g_MN)  # fmt: skip
