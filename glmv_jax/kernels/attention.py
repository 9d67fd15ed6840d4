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
    """The twin. Heads lead positions, and weights are divided by their sum after the product with the values, T K
    divisions instead of T S: on a CPU 1.5 to 2.3 times as fast as products in the arguments' order and a softmax."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGMK = (q_BTHK * K**-0.5).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    # Added, not selected: a selection would take part in the gradient, where masked weights are zero as it is.
    mask_BTS = jnp.where(visible(query, key), 0.0, MASKED)
    logits = [_logits(q_BGMK, k_BSGK) + jnp.tile(mask_BTS, (1, H // G, 1))[:, None]]
    if shared is not None:
        # The queries of a run side by side: one product with the keys they share.
        N = shared.valid.shape[0]
        others = _logits(_together(q_BGMK, N), shared.k) + jnp.where(shared.valid, 0.0, MASKED)[:, None, None]
        logits.append(_apart(others, B))
    highest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in logits])
    weights = [jnp.exp(x - jax.lax.stop_gradient(highest)) for x in logits]
    out_BGMK = _summed(weights[0], v_BSGK)
    if shared is not None:
        out_BGMK += _apart(_summed(_together(weights[1], N), shared.v.astype(v_BSGK.dtype)), B)
    out_BGMK = (out_BGMK / sum(x.sum(axis=-1, keepdims=True) for x in weights)).astype(v_BSGK.dtype)
    return out_BGMK.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _logits(q_BGMK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
    return jnp.matmul(q_BGMK, k_BSGK.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)


def _summed(weights_BGMS: jax.Array, v_BSGK: jax.Array) -> jax.Array:
    v_BGSK = v_BSGK.transpose(0, 2, 1, 3)
    return jnp.matmul(weights_BGMS.astype(v_BGSK.dtype), v_BGSK, preferred_element_type=jnp.float32)


def _together(x_BGMX: jax.Array, N: int) -> jax.Array:
    """[B, G, M, X] -> [N, G, B / N * M, X]: the queries of a run of rows side by side."""
    B, G, M, X = x_BGMX.shape
    return x_BGMX.reshape(N, B // N, G, M, X).swapaxes(1, 2).reshape(N, G, -1, X)


def _apart(x_NGMX: jax.Array, B: int) -> jax.Array:
    """The inverse of `_together`."""
    N, G, M, X = x_NGMX.shape
    return x_NGMX.reshape(N, G, B // N, -1, X).swapaxes(1, 2).reshape(B, G, -1, X)
