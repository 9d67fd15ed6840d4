"""A batch in pieces.

Where a loss is a sum over rows, the training step takes it piece by piece (`dealt`). A contrastive loss needs all rows
of the global batch at once, but only their embeddings (`in_pieces`): rows go through the towers piece by piece, keeping
nothing but embeddings; the loss gives their gradients; and each piece goes forward once more, keeping what its own
backward pass needs (GradCache, Gao et al., arXiv 2101.06983). Memory is that of one piece, the gradient that of the
whole batch, the price one more forward pass. What takes each position by itself, as an MLP does, can be given part of
each row at a time (`in_chunks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax.parallel import context, rules
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.typing import UserError


def dealt(rows: Any, pieces: int) -> Any:
    """A tree of arrays [B, ...] as [pieces, B / pieces, ...].

    Piece n is rows n, n + pieces, n + 2 pieces, ...: a batch that is split over devices gives each piece its rows from
    all of them, and none has to move. Raises: UserError when B does not divide.
    """
    B = jax.tree.leaves(rows)[0].shape[0]
    if B % pieces:
        raise UserError(f"{B} rows do not divide into {pieces} pieces; change the batch or the rows at a time")
    return jax.tree.map(lambda x: x.reshape(B // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), rows)


def in_pieces(fn: Callable[[Any], Any], rows: Any, pieces: int) -> Any:
    """fn(rows), computed for rows / pieces at a time, forward and backward.

    Args:
      fn: a tree of arrays [b, ...] -> a tree of arrays [b, ...], row by row independent.
      rows: a tree of arrays [B, ...], which is `dealt`.
      pieces: 1 is fn(rows) itself, with nothing computed twice.

    Raises: UserError when B does not divide into `pieces`.
    """
    if pieces == 1:
        return fn(rows)
    B = jax.tree.leaves(rows)[0].shape[0]
    # Inside a scan nothing can be merged across the checkpoint, so the barrier against that is left out.
    once_more = jax.checkpoint(fn, prevent_cse=False)
    _, out = jax.lax.scan(lambda _, piece: (None, once_more(piece)), None, dealt(rows, pieces))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, *x.shape[2:]), out)


def pieces_for(rows: int, devices: int, cost: float, budget: float) -> int:
    """The fewest equal pieces of `rows` rows, whole rows on each of `devices`, of at most `budget` on a device.

    cost: of one row (patches, say), in the unit of `budget`; budget 0: no limit. A single row may exceed it.
    """
    own = max(rows // devices, 1)
    fits = lambda n: own % n == 0 and (own // n * cost <= budget or n == own)  # noqa: E731
    return 1 if not budget else next(n for n in range(1, own + 1) if fits(n))


def in_chunks(
    fn: Callable[[jax.Array], jax.Array], x_BTD: jax.Array, budget: int, unit: int = 1, policy: Callable | None = None
) -> jax.Array:
    """fn(x), computed for part of each row at a time, forward and backward.

    Args:
      fn: [B, t, D] -> [B, t / unit, W]; it takes each run of `unit` positions by itself.
      budget: positions of a device at a time, at most (one run of each row if that is more); 0: all.
      policy: what a part keeps of itself for the backward pass, as of `jax.checkpoint`; None: nothing but its x.

    Where rows are split over devices (`parallel.context`), each device has its share of every part.
    """
    B, T, D = x_BTD.shape
    devices, own = context.parts(), B // mesh_lib.data_shards(rules.active_mesh())
    n = pieces_for(T // unit, devices, max(own, 1) * unit, budget)
    once_more = jax.checkpoint(fn, policy=policy, prevent_cse=n == 1)
    if n == 1:
        return once_more(x_BTD)

    def one(_: Any, x_BtD: jax.Array) -> tuple[Any, Any]:
        return None, once_more(rules.constrain(x_BtD, "batch", "length", None))

    x_NBtD = jnp.moveaxis(x_BTD.reshape(B, devices, n, -1, D), 2, 0).reshape(n, B, -1, D)
    _, y_NBtW = jax.lax.scan(one, None, x_NBtD)
    W = y_NBtW.shape[-1]
    return jnp.moveaxis(y_NBtW.reshape(n, B, devices, -1, W), 0, 2).reshape(B, T // unit, W)
