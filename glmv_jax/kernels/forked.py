"""Attention of a row whose segments fork into branches, as a prompt with its answers, in Pallas kernels for TPUs.

`attention.plain` is the twin. The kernels are those of `selected`, forward and backward, told which keys a query sees
by segment, branch and slot, as JAX's own (`splash`) compare segments only. As there each device runs them on its rows,
its heads and, where rows are split, its queries.
"""

from __future__ import annotations

import math

import jax

from glmv_jax.kernels import selected, splash
from glmv_jax.kernels.span import Span
from glmv_jax.parallel import context, rules


def supported(q_BTHK: jax.Array, k_BSGK: jax.Array, query: Span, key: Span) -> bool:
    """Whether the kernels take these: on a TPU, rows with branches that see themselves in order, causally, of
    `splash.SHORTEST` positions or more in whole 128 on each device, with heads of whole 128, that divide."""
    in_order = query.in_order is not None and key.in_order is not None
    if rules.device().platform != "tpu" or not in_order or query.branches is None or query.slots is None:
        return False
    whole = q_BTHK.shape[1] % (128 * context.parts() * min(context.parts(), 2)) == 0 == q_BTHK.shape[-1] % 128
    long_enough = q_BTHK.shape[1] == k_BSGK.shape[1] >= splash.SHORTEST
    return whole and long_enough and _divides(q_BTHK, k_BSGK)


def _divides(q_BTHK: jax.Array, k_BSGK: jax.Array) -> bool:
    if (mesh := rules.active_mesh()) is None:
        return True
    rows, heads, groups = (
        math.prod(mesh.shape[axis] for axis in rules.entry_axes(*context.spec(name)))
        for name in ("batch", "heads", "kv_heads")
    )
    return q_BTHK.shape[0] % rows == q_BTHK.shape[2] % heads == k_BSGK.shape[2] % groups == 0


def forked(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span, interpret: bool = False
) -> jax.Array:
    """As `attention.plain`, of spans that are in order and have slots and branches."""

    def own(q: jax.Array, k: jax.Array, v: jax.Array, query: Span, key: Span) -> jax.Array:
        if context.parts() > 1:
            k, v, key = jax.tree.map(context.gathered, (k, v, key))
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        of_queries = (x[..., None] for x in (query.segments, query.branches, query.slots))
        of_keys = (x[:, None] for x in (key.segments, key.branches))
        out, _ = selected.attend(q, k, v, selected.Forked(*of_queries, *of_keys), query.slots, interpret)
        return out.swapaxes(1, 2)

    mesh = rules.active_mesh()
    if mesh is None or mesh.size == 1:
        return own(q_BTHK, k_BSGK, v_BSGK, query, key)
    q, kv = (context.spec("batch", "length", heads, None) for heads in ("heads", "kv_heads"))
    row = context.spec("batch", "length")
    return context.per_device(own, (q, kv, kv, row, row), q, kernel=True)(q_BTHK, k_BSGK, v_BSGK, query, key)
