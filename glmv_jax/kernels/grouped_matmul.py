"""x_r W_g(r) for rows sorted by group: the products of a mixture of experts, without capacity and without dropped rows.

`jax.lax.ragged_dot` is not used: on a CPU it multiplies every row with every matrix, and on a TPU its weight gradient
does (1 + G times the arithmetic, seen in compiled programs). Here a loop goes over tiles of one group each, as many as
there are, forward and backward; on TPUs the kernels of `grouped_tiles` do the same.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmv_jax.kernels import grouped_tiles
from glmv_jax.kernels.grouped_tiles import Matrices
from glmv_jax.parallel import rules


def grouped_matmul(
    x_MK: jax.Array, ws_GKN: Matrices, sizes_G: jax.Array, expected: int = 0, rest: bool = True
) -> Matrices:
    """[M, N] of each w: row r of group g times w[g], in x's dtype; rows after the last group are zero.

    ws_GKN: stacks of matrices that read the same rows, whose gradients by x are summed as they come.
    sizes_G: int32, how many rows each group has, in order; they sum to at most M.
    expected: how much that is on average, which tiles are made for; 0: M.
    rest: False where nobody looks at rows after the last group, of the product and of x's gradient: they may be
      anything, and need not be written.
    """
    expected = expected or len(x_MK)
    if supported(x_MK, *ws_GKN):
        return kernels(x_MK, ws_GKN, sizes_G, expected, rest)
    if not rest:  # the gradient multiplies whole tiles, with zeros where a group has ended
        x_MK = jnp.where(jnp.arange(len(x_MK))[:, None] < sizes_G.sum(), x_MK, 0)
    return tuple(tiled(x_MK, w_GKN, sizes_G, tile_rows(expected, len(sizes_G))) for w_GKN in ws_GKN)


def supported(x_MK: jax.Array, *ws_GKN: jax.Array) -> bool:
    """Whether the kernels take these: on a TPU, rows and all widths (the gradient swaps them) in whole tiles."""
    whole = all(n % grouped_tiles.LANES == 0 for n in (len(x_MK), *(n for w in ws_GKN for n in w.shape[1:])))
    return rules.device().platform == "tpu" and whole


def kernels(
    x_MK: jax.Array, ws_GKN: Matrices, sizes_G: jax.Array, expected: int, rest: bool = True, interpret: bool = False
) -> Matrices:
    """The fast path on TPUs. interpret: run by the interpreter, for tests elsewhere."""
    ws_GKN = tuple(w.astype(x_MK.dtype) for w in ws_GKN)
    if not rest:
        return grouped_tiles.grouped(x_MK, ws_GKN, sizes_G, expected, interpret)
    # Rows after the last group are written neither forward nor backward: what lies there must not come out. They take
    # part in nothing else, as the kernels leave them out of an expert's gradient.
    real_M1 = jnp.arange(len(x_MK))[:, None] < sizes_G.sum()
    made = grouped_tiles.grouped(jnp.where(real_M1, x_MK, 0), ws_GKN, sizes_G, expected, interpret)
    return tuple(jnp.where(real_M1, y_MN, 0) for y_MN in made)


def plain(x_MK: jax.Array, ws_GKN: Matrices, sizes_G: jax.Array) -> Matrices:
    """The twin: every row with every matrix, G times the arithmetic."""
    ends_G = jnp.cumsum(sizes_G)
    rows_M1 = jnp.arange(x_MK.shape[0])[:, None]
    mine_MG = (rows_M1 >= ends_G - sizes_G) & (rows_M1 < ends_G)
    x_MK = jnp.where(mine_MG.any(1, keepdims=True), x_MK, 0)
    product = lambda w_GKN: jnp.einsum("mg,mk,gkn->mn", mine_MG.astype(x_MK.dtype), x_MK, w_GKN.astype(x_MK.dtype))  # noqa: E731
    return tuple(map(product, ws_GKN))


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile. Each group fills its last tile by half on average, so that with a fifth of a group's rows the
    arithmetic is a tenth more than ideal; between 8, below which a product is no longer one of matrices, and 512."""
    return int(np.clip(2 ** np.floor(np.log2(max(rows / groups / 5, 1))), 8, 512))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def tiled(x_MK: jax.Array, w_GKN: jax.Array, sizes_G: jax.Array, rows: int) -> jax.Array:
    """The path for CPUs and GPUs, in tiles of so many rows."""
    return _product(x_MK, w_GKN, sizes_G, rows, transposed=False)


def _forward(x_MK: jax.Array, w_GKN: jax.Array, sizes_G: jax.Array, rows: int) -> tuple:
    return tiled(x_MK, w_GKN, sizes_G, rows), (x_MK, w_GKN, sizes_G)


def _backward(rows: int, saved: tuple, g_MN: jax.Array) -> tuple:
    x_MK, w_GKN, sizes_G = saved
    g_MN = g_MN.astype(x_MK.dtype)
    dw_GKN = _outer_products(x_MK, g_MN, sizes_G, rows, w_GKN.dtype)
    return _product(g_MN, w_GKN, sizes_G, rows, transposed=True), dw_GKN, None


tiled.defvjp(_forward, _backward)


def _tiles(sizes_G: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """(how many tiles of `rows` rows there are, the number of each group's first one)."""
    tiles_G = -(-sizes_G // rows)
    return tiles_G.sum(), jnp.cumsum(tiles_G) - tiles_G


def _tile(t: jax.Array, first_G: jax.Array, sizes_G: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(group of tile t, its first row, how many of its rows are the group's)."""
    # The last group that begins at or before t; empty ones begin where the next does.
    group = jnp.searchsorted(first_G, t, side="right") - 1
    inside = (t - first_G[group]) * rows
    start = jnp.cumsum(sizes_G)[group] - sizes_G[group]
    return group, start + inside, jnp.minimum(sizes_G[group] - inside, rows)


@functools.partial(jax.jit, static_argnames=("rows", "transposed"), inline=True)
def _product(x_MK: jax.Array, w_GKN: jax.Array, sizes_G: jax.Array, rows: int, transposed: bool) -> jax.Array:
    M = x_MK.shape[0]
    x_MK = jnp.pad(x_MK, ((0, rows), (0, 0)))  # the last tile of a group may reach beyond the rows there are
    count, first_G = _tiles(sizes_G, rows)

    def one(t: jax.Array, y_MN: jax.Array) -> jax.Array:
        group, start, _ = _tile(t, first_G, sizes_G, rows)
        x_RK = jax.lax.dynamic_slice_in_dim(x_MK, start, rows)
        w = jax.lax.dynamic_index_in_dim(w_GKN, group, keepdims=False).astype(x_MK.dtype)
        y_RN = jax.lax.dot_general(x_RK, w, (((1,), (1 if transposed else 0,)), ((), ())))
        # Rows of the next group that this tile reaches into are written again by that group's own tile.
        return jax.lax.dynamic_update_slice_in_dim(y_MN, y_RN, start, axis=0)

    y_MN = jnp.zeros((M + rows, w_GKN.shape[1 if transposed else 2]), x_MK.dtype)
    y_MN = jax.lax.fori_loop(0, count, one, y_MN)[:M]
    return jnp.where(jnp.arange(M)[:, None] < sizes_G.sum(), y_MN, 0)


@functools.partial(jax.jit, static_argnames=("rows", "dtype"), inline=True)
def _outer_products(x_MK: jax.Array, g_MN: jax.Array, sizes_G: jax.Array, rows: int, dtype: Any) -> jax.Array:
    """[G, K, N]: x^T g over the rows of each group, summed in float32."""
    G = sizes_G.shape[0]
    x_MK, g_MN = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x_MK, g_MN))
    count, first_G = _tiles(sizes_G, rows)

    def one(t: jax.Array, dw_GKN: jax.Array) -> jax.Array:
        group, start, mine = _tile(t, first_G, sizes_G, rows)
        x_RK, g_RN = (jax.lax.dynamic_slice_in_dim(a, start, rows) for a in (x_MK, g_MN))
        g_RN = jnp.where(jnp.arange(rows)[:, None] < mine, g_RN, 0)
        product_KN = jax.lax.dot_general(x_RK, g_RN, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        so_far_KN = jax.lax.dynamic_index_in_dim(dw_GKN, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw_GKN, so_far_KN + product_KN, group, axis=0)

    zeros_GKN = jnp.zeros((G, x_MK.shape[1], g_MN.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, count, one, zeros_GKN).astype(dtype)
