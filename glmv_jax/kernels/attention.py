"""Attention over segments: plain jnp, and kernels that write no logits to memory: cuDNN's on NVIDIA GPUs, and on TPUs
`kernels.splash` and `kernels.forked`; on a CPU `kernels.tiles` where branches leave most pairs out."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from glmv_jax.kernels import forked, splash, tiles
from glmv_jax.kernels.span import MASKED, Span, visible
from glmv_jax.parallel import caches, context, rules


class Shared(NamedTuple):
    """Keys and values that rows have in common: k, v [N, G, S, K], all before the rows' own; valid [N, S] bool.

    Of B rows each run of B / N has one of these; none of its rows holds a copy.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array


def attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with grouped key/value heads (H = G * R); softmax in float32. Returns [B, T, H, K].

    Where rows are split over devices, each gathers the keys and values of the row for its own queries.
    """
    if splash.supported(q_BTHK, k_BSGK, query, key):
        return splash.splash(q_BTHK, k_BSGK, v_BSGK, query, key)
    if forked.supported(q_BTHK, k_BSGK, query, key):
        return forked.forked(q_BTHK, k_BSGK, v_BSGK, query, key)
    if tiles.supported(q_BTHK, query, key):
        return tiles.tiled(q_BTHK, k_BSGK, v_BSGK, query, key)
    if context.parts() == 1 or q_BTHK.shape[1] == 1:
        return _attention(q_BTHK, k_BSGK, v_BSGK, query, key)

    def own(q: jax.Array, k: jax.Array, v: jax.Array, query: Span, key: Span) -> jax.Array:
        k, v, key = jax.tree.map(context.gathered, (k, v, key))
        return _attention(q, k, v, query, key)

    q, kv = (context.spec("batch", "length", heads, None) for heads in ("heads", "kv_heads"))
    row = context.spec("batch", "length")
    return context.per_device(own, (q, kv, kv, row, row), q, kernel=True)(q_BTHK, k_BSGK, v_BSGK, query, key)


def _attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span) -> jax.Array:
    path = fused if supported(q_BTHK, k_BSGK) else plain
    return path(q_BTHK, k_BSGK, v_BSGK, query, key)


def cached(
    q_BTHK: jax.Array, k_CSK: jax.Array, v_CSK: jax.Array, query: Span, key: Span, shared: Shared | None = None
) -> jax.Array:
    """`attention` to keys and values as a cache keeps them: rows and their heads merged, C = B * G, slots, numbers.

    A product with the few queries of a step of decoding reads them where they lie; those of `attention` would first
    copy the cache. Merged, because XLA's CPU backend otherwise writes a step's keys twice, each time into a copy of the
    whole cache: in the form that it is kept in, and in the one that its products take.
    Over a mesh that splits heads each device has its own, see `parallel.caches`. UserError when these do not divide.
    """
    if caches.parts() == 1:
        return _cached(q_BTHK, k_CSK, v_CSK, query, key, shared)
    caches.check(len(k_CSK) // len(q_BTHK), caches.parts())
    rows, heads, kept = context.spec("batch"), context.spec("batch", None, "heads"), caches.spec(*rules.in_force())
    spans = jax.tree.map(lambda x: rows if len(x) > 1 else P(), (query, key))  # of one row: the same for all
    prompts = rows if shared is None else Shared._make((*[context.spec("batch", "kv_heads")] * 2, rows))
    mapped = context.per_device(_cached, (heads, kept, kept, *spans, prompts), heads, kernel=True)
    return mapped(q_BTHK, k_CSK, v_CSK, query, key, shared)


def _cached(
    q_BTHK: jax.Array, k_CSK: jax.Array, v_CSK: jax.Array, query: Span, key: Span, shared: Shared | None
) -> jax.Array:
    B, T, _, K = q_BTHK.shape
    C, S, _ = k_CSK.shape
    G = C // B
    if shared is None and supported(q_BTHK, k_CSK.reshape(B, G, S, K).swapaxes(1, 2)):
        k_BSGK, v_BSGK = (x.reshape(B, G, S, K).swapaxes(1, 2) for x in (k_CSK, v_CSK))
        return fused(q_BTHK, k_BSGK, v_BSGK, query, key)
    q_BGMK = _heads_lead(q_BTHK, G)
    M = q_BGMK.shape[2]
    own_CMS = jnp.einsum("cmk,csk->cms", q_BGMK.reshape(C, M, K), k_CSK, preferred_element_type=jnp.float32)
    mask_BTS = jnp.where(visible(query, key), 0.0, MASKED)
    logits = [own_CMS.reshape(B, G, M, S) + jnp.tile(mask_BTS, (1, M // T, 1))[:, None]]
    if shared is not None:
        # The queries of a run side by side: one product with the keys they share.
        N = shared.valid.shape[0]
        q_NGMK = _together(q_BGMK, N)
        others = jnp.einsum("ngmk,ngsk->ngms", q_NGMK, shared.k, preferred_element_type=jnp.float32)
        logits.append(_apart(others + jnp.where(shared.valid, 0.0, MASKED)[:, None, None], B))
    highest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in logits])
    weights = [jnp.exp(x - highest) for x in logits]
    out_BGMK = _summed(weights[0].reshape(C, M, S), v_CSK).reshape(B, G, M, K)
    if shared is not None:
        out_BGMK += _apart(_summed(_together(weights[1], N), shared.v.astype(v_CSK.dtype)), B)
    out_BGMK = (out_BGMK / sum(x.sum(axis=-1, keepdims=True) for x in weights)).astype(v_CSK.dtype)
    return _heads_last(out_BGMK, T)


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


def plain(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span) -> jax.Array:
    """The twin. Heads lead positions, and weights are divided by their sum after the product with the values, T K
    divisions instead of T S: on a CPU 1.5 to 2.3 times as fast as products in the arguments' order and a softmax."""
    T, G = q_BTHK.shape[1], k_BSGK.shape[2]
    q_BGMK = _heads_lead(q_BTHK, G)
    # Added, not selected: a selection would take part in the gradient, where masked weights are zero as it is.
    mask_BTS = jnp.where(visible(query, key), 0.0, MASKED)
    logits = jnp.matmul(q_BGMK, k_BSGK.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    logits += jnp.tile(mask_BTS, (1, q_BGMK.shape[2] // T, 1))[:, None]
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    out_BGMK = _summed(weights, v_BSGK.transpose(0, 2, 1, 3)) / weights.sum(axis=-1, keepdims=True)
    return _heads_last(out_BGMK.astype(v_BSGK.dtype), T)


def _heads_lead(q_BTHK: jax.Array, G: int) -> jax.Array:
    """Queries over sqrt(K) [B, G, M, K]: those of the R heads of a group of keys one after the other, M = R * T."""
    B, T, H, K = q_BTHK.shape
    return (q_BTHK * K**-0.5).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)


def _heads_last(out_BGMK: jax.Array, T: int) -> jax.Array:
    """[B, G, R * T, K] -> [B, T, H, K]."""
    B, G, M, K = out_BGMK.shape
    return out_BGMK.reshape(B, G, M // T, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, K)


def _summed(weights_XMS: jax.Array, v_XSK: jax.Array) -> jax.Array:
    return jnp.matmul(weights_XMS.astype(v_XSK.dtype), v_XSK, preferred_element_type=jnp.float32)


def _together(x_BGMX: jax.Array, N: int) -> jax.Array:
    """[B, G, M, X] -> [N, G, B / N * M, X]: the queries of a run of rows side by side."""
    B, G, M, X = x_BGMX.shape
    return x_BGMX.reshape(N, B // N, G, M, X).swapaxes(1, 2).reshape(N, G, -1, X)


def _apart(x_NGMX: jax.Array, B: int) -> jax.Array:
    """The inverse of `_together`."""
    N, G, M, X = x_NGMX.shape
    return x_NGMX.reshape(N, G, B // N, -1, X).swapaxes(1, 2).reshape(B, G, -1, X)
