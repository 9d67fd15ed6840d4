"""Attention over segments, in plain jnp (the twin that faster paths are held against)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Not -inf: a query with no key at all (padding) must stay finite. Far below any logit in float32 and bfloat16.
MASKED = -2.0e38


class Span(NamedTuple):
    """What a position may see: the same segment and, when slots are given, keys at or before its own slot.

    segments: [B, T] int; slots: [B, T] int order inside the row, or None for attention in both directions.
    branches: [B, T] int or None: within a segment, branch 0 is a trunk that all see and every other number a branch
        that only itself sees (several continuations of one prompt).
    """

    segments: jax.Array
    slots: jax.Array | None = None
    branches: jax.Array | None = None


def visible(query: Span, key: Span) -> jax.Array:
    """[B, T, S] bool. Padding (segment 0) sees padding, so that its softmax is well defined; nothing else sees it."""
    mask_BTS = query.segments[:, :, None] == key.segments[:, None, :]
    if query.slots is not None:
        mask_BTS &= key.slots[:, None, :] <= query.slots[:, :, None]
    if query.branches is not None:
        key_B1S = key.branches[:, None, :]
        mask_BTS &= (key_B1S == 0) | (key_B1S == query.branches[:, :, None])
    return mask_BTS


def attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with grouped key/value heads (H = G * R); softmax in float32. Returns [B, T, H, K]."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q = (q_BTHK * K**-0.5).reshape(B, T, G, H // G, K)
    logits = jnp.einsum("btgrk,bsgk->bgrts", q, k_BSGK, preferred_element_type=jnp.float32)
    logits = jnp.where(visible(query, key)[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v_BSGK).reshape(B, T, H, K)
