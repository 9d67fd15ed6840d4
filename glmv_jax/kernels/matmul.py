"""x W for activations of any rank, and for a few rows and a matrix that no cache holds.

XLA's CPU backend sends only matrix-by-matrix products to its fast library: a [B, T, I] operand costs 1.6 to 2.4 times
as much as the same numbers as [B * T, I] (8192 x 128 x 352, jax 0.10). Elsewhere the compiler does this itself, and
merging dimensions by hand would undo a sharding of T: where rows are split it is left out on a CPU too.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from glmv_jax.parallel import context, rules


def supported() -> bool:
    """Whether the flattened form is the faster one there."""
    return rules.device().platform == "cpu" and context.parts() == 1


def flattened(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """The fast path: leading dimensions merged, one matrix product, and apart again."""
    y = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ w_IO
    return y.reshape(*x.shape[:-1], w_IO.shape[-1])


def plain(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """The twin."""
    return x @ w_IO


def matmul(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """[..., I] x [I, O] -> [..., O]."""
    return flattened(x, w_IO) if supported() else plain(x, w_IO)


def by_rows(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    """[..., I] x [O, I] -> [..., O], summed in float32, as (W x^T)^T: for a few rows on a CPU.

    There the product of 2 to 8 rows with an [I, O] matrix of 28 MB takes 1.4 to 1.6 times as long as that of one row;
    in this form, from the matrix laid out by rows (`models.block.by_rows`), 1.0 to 1.2 (1536 x 4608, jax 0.10).
    """
    y_ON = jax.lax.dot_general(
        w_OI, x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    # Without the barrier XLA takes the transposition into the product, and that is the slow form again.
    return jax.lax.optimization_barrier(y_ON).T.reshape(*x.shape[:-1], -1)
