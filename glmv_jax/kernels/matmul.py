"""x W for activations of any rank, and for a few rows and a matrix that no cache holds.

A matrix that several axes of the mesh split along what it reads has its gradient brought home axis by axis
(`scattered`). XLA's own way is to sum it whole over all devices, of which each then keeps a part: twice the bytes.

XLA's CPU backend sends only matrix-by-matrix products to its fast library: a [B, T, I] operand costs 1.6 to 2.4 times
as much as the same numbers as [B * T, I] (8192 x 128 x 352, jax 0.10). Elsewhere the compiler does this itself, and
merging dimensions by hand would undo a sharding of T: where rows are split it is left out on a CPU too.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

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


def matmul(x: jax.Array, w_IO: jax.Array, axes: tuple[str, str | None] | None = None) -> jax.Array:
    """[..., I] x [I, O] -> [..., O]. axes: the logical ones of W, if it is a parameter."""
    if axes is not None and (over := split_over(x, w_IO, axes)):
        return scattered(x, w_IO, over)
    return flattened(x, w_IO) if supported() else plain(x, w_IO)


# --- gradients that are scattered -------------------------------------------------------------------------------------


def split_over(x: jax.Array, w_IO: jax.Array, axes: tuple[str, str | None]) -> tuple[str, ...]:
    """The axes of the mesh along which `scattered` brings the gradient home: those that split I, where they are
    several, all of which split the rows [B, T] of x too, and nothing else splits W. Else none."""
    now = rules.active()
    if x.ndim != 3 or now is None or jax.sharding.get_abstract_mesh().manual_axes:
        return ()
    mesh, active = now
    sizes = lambda entry: math.prod(mesh.shape[axis] for axis in rules.entry_axes(entry))  # noqa: E731
    (reads, makes), (batch, length) = active.spec(axes, mesh), context.spec("batch", "length")
    over = tuple(axis for axis in rules.entry_axes(reads) if mesh.shape[axis] > 1)
    rows = {*rules.entry_axes(batch), *rules.entry_axes(length)}
    divides = x.shape[0] % sizes(batch) == x.shape[1] % sizes(length) == w_IO.shape[0] % sizes(reads) == 0
    return over if len(over) > 1 and rows.issuperset(over) and sizes(makes) == 1 and divides else ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scattered(x_BTI: jax.Array, w_IO: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """`plain`, whose gradient by W each device sums over its rows, and all then over one axis after the other."""
    return plain(x_BTI, w_IO)


def _backward(over: Any, saved: tuple, g_BTO: jax.Array) -> tuple:
    x_BTI, w_IO = saved
    row = context.spec("batch", "length", None)
    others = tuple(axis for entry in row for axis in rules.entry_axes(entry) if axis not in over)

    def own(x_BTI: jax.Array, g_BTO: jax.Array) -> jax.Array:
        dw = jnp.einsum("bti,bto->io", x_BTI, g_BTO)
        for axis in over:
            dw = jax.lax.psum_scatter(dw, axis, scatter_dimension=0, tiled=True)
        return jax.lax.psum(dw, others) if others else dw

    dw = context.per_device(own, (row, row), PartitionSpec(over, None), kernel=True)(x_BTI, g_BTO)
    return g_BTO @ w_IO.T, dw


scattered.defvjp(lambda x, w, over: (plain(x, w), (x, w)), _backward)


# --- a few rows -------------------------------------------------------------------------------------------------------


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
