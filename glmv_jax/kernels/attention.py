"""Attention over segments: plain jnp, and on NVIDIA GPUs cuDNN's fused kernel, which writes no logits to memory."""

from __future__ import annotations

import functools
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


class Shared(NamedTuple):
    """Keys and values that rows have in common: k, v [N, S, G, K], all before the rows' own; valid [N, S] bool.

    Of B rows each run of B / N has one of these; none of its rows holds a copy.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span, shared: Shared | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with grouped key/value heads (H = G * R); softmax in float32. Returns [B, T, H, K]."""
    if shared is None and supported(q_BTHK, k_BSGK):
        return fused(q_BTHK, k_BSGK, v_BSGK, query, key)
    return plain(q_BTHK, k_BSGK, v_BSGK, query, key, shared)


def supported(q_BTHK: jax.Array, k_BSGK: jax.Array) -> bool:
    """Whether cuDNN's kernel takes these: half precision, even lengths (with a mask), narrow heads, Ampere or newer."""
    T, K, S = q_BTHK.shape[1], q_BTHK.shape[3], k_BSGK.shape[1]
    half = q_BTHK.dtype == k_BSGK.dtype and q_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    return half and T % 2 == 0 and S % 2 == 0 and K % 8 == 0 and K <= 128 and _fused_device()


@functools.cache
def _fused_device() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; another maker's GPU has none, or "gfx90a"
    return capability.partition(".")[0].isdecimal() and float(capability) >= 8.0


def fused(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span) -> jax.Array:
    """The fast path. The mask is one number a pair of positions, shared by the heads: half a MB at 512 positions."""
    mask_B1TS = visible(query, key)[:, None]
    return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask_B1TS, implementation="cudnn")


def plain(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span, shared: Shared | None = None
) -> jax.Array:
    """The twin."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q = (q_BTHK * K**-0.5).reshape(B, T, G, H // G, K)
    logits = _products(q, k_BSGK, visible(query, key))
    if shared is not None:
        # The queries of a run side by side: one product with the keys they share.
        N = shared.valid.shape[0]
        run = q.reshape(N, B // N * T, G, H // G, K)
        others = _products(run, shared.k, jnp.broadcast_to(shared.valid[:, None], (N, run.shape[1], shared.k.shape[1])))
        logits = jnp.concatenate([logits, _apart(others, B // N)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSGK.dtype)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights[..., :S], v_BSGK)
    if shared is not None:
        others = jnp.einsum("bgrts,bsgk->btgrk", _together(weights[..., S:], N), shared.v.astype(v_BSGK.dtype))
        out = out + others.reshape(out.shape)
    return out.reshape(B, T, H, K)


def _products(q_BTGRK: jax.Array, k_BSGK: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    logits = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    return jnp.where(visible_BTS[:, None, None], logits, MASKED)


def _apart(x: jax.Array, run: int) -> jax.Array:
    """[N, G, R, run * T, S] -> [N * run, G, R, T, S]."""
    N, G, R, T, S = x.shape
    return jnp.moveaxis(x.reshape(N, G, R, run, T // run, S), 3, 1).reshape(N * run, G, R, T // run, S)


def _together(x: jax.Array, N: int) -> jax.Array:
    """The inverse of `_apart`."""
    B, G, R, T, S = x.shape
    return jnp.moveaxis(x.reshape(N, B // N, G, R, T, S), 1, 3).reshape(N, G, R, B // N * T, S)
