"""Rows of an array to the devices that need them, by an all-to-all whose pieces differ in size, and back.

What goes where is known on the host before the step (`data.balancing.exchange`) and reaches the devices as one table of
counts. A device lays its rows out by destination and gets what it is sent by source, so the way back is the same
dispatch with the table transposed, and so is the gradient.

Two implementations with one result. "ragged" sends each piece as long as it is (`jax.lax.ragged_all_to_all`, which XLA
has for TPUs and GPUs); "padded" sends all pieces at the length of the longest one allowed, which runs anywhere. A
step that is compiled for TPUs with `ASYNC` can compute while patches travel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from glmv_jax.typing import UserError

IMPLS = ("ragged", "padded")

# A compiler option for TPUs: without it a program waits for each ragged transfer. With it, of the three of a small step
# (patches, features, their gradient) all are asynchronous on v5e, and one on v5p (libtpu 0.0.42).
ASYNC = {"xla_tpu_enable_async_ragged_all_to_all": True}


def dispatch(
    tree: Any, counts_RR: jax.Array, mesh: Mesh, axes: Sequence[str], *, rows: int, impl: str | None = None,
    longest: int | None = None,
) -> Any:  # fmt: skip
    """Arrays [R * n, ...], split over the R devices along `axes` -> arrays [R * rows, ...], split the same way.

    Args:
      tree: arrays; device s has counts[s, 0] rows for device 0, then counts[s, 1] for device 1, ..., then padding.
      counts_RR: [R, R] int, rows from a device (row) to a device (column).
      rows: what a device has room for. It gets the rows from device 0, then those from device 1, ..., then zeros.
      impl: of IMPLS; None: "ragged" on TPUs, "padded" elsewhere.
      longest: of "padded", the most rows a device sends to one other; None: all n.

    Counts that exceed n, `rows` or `longest` give rubbish without a word, so `check` them on the host. Floating arrays
    carry gradients, which travel back. Raises UserError for an unknown `impl`.
    """
    if impl is None:
        impl = "ragged" if mesh.devices.flat[0].platform == "tpu" else "padded"
    if impl not in IMPLS:
        raise UserError(f"dispatch impl={impl!r} is not known; use one of {', '.join(IMPLS)}")
    axes = tuple(axes)
    R = math.prod(mesh.shape[a] for a in axes)
    if counts_RR.shape != (R, R):
        raise UserError(f"dispatch: a table of {tuple(counts_RR.shape)} counts for {R} devices along {', '.join(axes)}")

    def local(counts: jax.Array, tree: Any) -> Any:
        send = _ragged if impl == "ragged" else functools.partial(_padded, longest=longest)
        return jax.tree.map(lambda x: _exchanged(x, counts, send, axes, rows), tree)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(axes), check_vma=False)(counts_RR, tree)


def check(counts_RR: np.ndarray, n: int, rows: int, longest: int | None = None) -> None:
    """UserError when a dispatch of these counts does not fit; on the host, where the counts are made."""
    for what, most, have in (
        ("sends", counts_RR.sum(1).max(), n), ("gets", counts_RR.sum(0).max(), rows),
        ("sends to one other", counts_RR.max(), n if longest is None else longest),
    ):  # fmt: skip
        if most > have:
            raise UserError(f"dispatch: a device {what} {most} rows and has room for {have}; enlarge it")


# What `local` does with one array. Integers have no gradient and skip the rule.
def _exchanged(x: jax.Array, counts: jax.Array, send: Any, axes: tuple[str, ...], rows: int) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return send(x, counts, axes, rows)

    @jax.custom_vjp
    def run(x: jax.Array, counts: jax.Array) -> jax.Array:
        return send(x, counts, axes, rows)

    def forward(x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run(x, counts), counts

    def backward(counts: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
        return send(g, counts.T, axes, x.shape[0]), None

    run.defvjp(forward, backward)
    return run(x, counts)


def _offsets(counts_R: jax.Array) -> jax.Array:
    """Where each of the pieces of these lengths begins."""
    return jnp.cumsum(counts_R) - counts_R


def _ragged(x: jax.Array, counts: jax.Array, axes: tuple[str, ...], rows: int) -> jax.Array:
    me = jax.lax.axis_index(axes)
    there_R = (jnp.cumsum(counts, axis=0) - counts)[me]  # where our pieces begin on each other device
    out = jnp.zeros((rows, *x.shape[1:]), x.dtype)
    return jax.lax.ragged_all_to_all(x, out, _offsets(counts[me]), counts[me], there_R, counts[:, me], axis_name=axes)


def _padded(x: jax.Array, counts: jax.Array, axes: tuple[str, ...], rows: int, longest: int | None) -> jax.Array:
    me = jax.lax.axis_index(axes)
    K = min(x.shape[0], rows) if longest is None else longest
    k = jnp.arange(K)
    from_RK = _offsets(counts[me])[:, None] + k
    pieces = jax.lax.all_to_all(jnp.take(x, from_RK, axis=0, mode="clip"), axes, 0, 0)
    to_RK = jnp.where(k < counts[:, me][:, None], _offsets(counts[:, me])[:, None] + k, rows)
    return jnp.zeros((rows, *x.shape[1:]), x.dtype).at[to_RK].set(pieces, mode="drop")
