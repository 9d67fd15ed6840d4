"""Attention of rows whose segments fork into branches, as a prompt with its answers, on a CPU: by tiles, of which most
of those that hold no visible pair are left out.

`attention.plain` is the twin, `forked` the kernel on TPUs. Of a row of a prompt of 32 tokens and eight answers of 64 a
quarter of the pairs under the diagonal are visible, of a row of several such prompts fewer. Each tile of queries has a
list of the tiles of keys that it looks at, and a step goes through the n-th of all lists at once: products of single
tiles are too small for a loop of XLA's. The running softmax and the backward pass are those of FlashAttention-2 (arXiv
2307.08691, algorithms 1 and 2). Letters: N tiles of queries, M of keys, of t positions each; Q = R t, what a tile has
of the R heads that share keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.kernels.span import MASKED, Span, visible
from glmv_jax.parallel import rules

SHORTEST = 256  # positions of a row


class _Lists(NamedTuple):
    """spans: of the tiles [B, N, t]; keys: [B, N, M], for a tile of queries the numbers of tiles of keys, those that
    it looks at first; longest: how many these are at most."""

    spans: Span
    keys: jax.Array
    longest: jax.Array


class _Kept(NamedTuple):
    """The arguments, what they gave, and logsumexp of the logits [B, N, G, Q, 1]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lists: _Lists
    out: jax.Array
    total: jax.Array


def supported(q_BTHK: jax.Array, query: Span, key: Span) -> bool:
    """Whether these are taken: on one CPU device, rows with branches that see themselves, of SHORTEST positions on."""
    mesh = rules.active_mesh()
    alone = rules.device().platform == "cpu" and (mesh is None or mesh.size == 1)
    in_order = query.in_order is not None and key.in_order is not None and query.slots is not None
    return alone and in_order and query.branches is not None and q_BTHK.shape[1] >= SHORTEST


def tiled(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, query: Span, key: Span) -> jax.Array:
    """As `attention.plain`, of spans that are in order and have slots and branches."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    t = 32 if T <= 1024 else 64  # small ones hold less in vain; of many, the putting together counts

    def apart(x_BT: jax.Array, fill: float = 0) -> jax.Array:
        """[B, T, ...] -> [B, N, t, ...]."""
        rest = ((0, 0), (0, -T % t), *[(0, 0)] * (x_BT.ndim - 2))
        return jnp.pad(x_BT, rest, constant_values=fill).reshape(B, -1, t, *x_BT.shape[2:])

    segments, slots, branches = (apart(jnp.broadcast_to(x, (B, T)), -1) for x in query[:3])  # what fills up sees itself
    q_BNtGRK = apart(q_BTHK * K**-0.5).reshape(B, -1, t, G, H // G, K)
    q_BNGQK = q_BNtGRK.transpose(0, 1, 3, 4, 2, 5).reshape(B, -1, G, H // G * t, K)
    k_BMGtK, v_BMGtK = (apart(x).swapaxes(2, 3) for x in (k_BTGK, v_BTGK))
    out_BNGQK = _attend(q_BNGQK, k_BMGtK, v_BMGtK, _lists(Span(segments, slots, branches)))
    out_BNtGRK = out_BNGQK.reshape(B, -1, G, H // G, t, K).transpose(0, 1, 4, 2, 3, 5)
    return out_BNtGRK.reshape(B, -1, H, K)[:, :T].astype(v_BTGK.dtype)


def _lists(spans: Span) -> _Lists:
    B, N, t = spans.segments.shape
    row = jax.tree.map(lambda x: x.reshape(B, N * t), spans)
    looks_BNM = visible(row, row).reshape(B, N, t, N, t).any(axis=(2, 4))
    return _Lists(spans, jnp.argsort(~looks_BNM, axis=-1, stable=True), looks_BNM.sum(-1).max())


@jax.custom_vjp
def _attend(q_BNGQK: jax.Array, k_BMGtK: jax.Array, v_BMGtK: jax.Array, lists: _Lists) -> jax.Array:
    return _forward(q_BNGQK, k_BMGtK, v_BMGtK, lists)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, lists: _Lists) -> tuple[jax.Array, _Kept]:
    """(out, what the backward pass wants); out in float32."""

    def step(n: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, summed = done
        own, mask = _nth(lists, n)
        logits = _logits(q, _pick(own, k), mask)
        higher = jnp.maximum(highest, logits.max(axis=-1, keepdims=True))
        weights, kept = jnp.exp(logits - higher), jnp.exp(highest - higher)
        summed = summed * kept + _product(weights.astype(v.dtype), _pick(own, v))
        return higher, total * kept + weights.sum(axis=-1, keepdims=True), summed

    zero = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    start = zero + MASKED, zero, jnp.zeros(q.shape, jnp.float32)
    highest, total, summed = jax.lax.fori_loop(0, lists.longest, step, start)
    out = summed / total
    return out, _Kept(q, k, v, lists, out, highest + jnp.log(total))


def _backward(kept: _Kept, grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, lists, out, total = kept
    along = (grad * out).sum(axis=-1, keepdims=True)

    def step(n: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq, dk, dv = done
        own, mask = _nth(lists, n)
        own_k, own_v = _pick(own, k), _pick(own, v)
        weights = jnp.exp(_logits(q, own_k, mask) - total)
        dlogits = (weights * (_product(grad.astype(v.dtype), own_v.swapaxes(-1, -2)) - along)).astype(q.dtype)
        turned = lambda x: x.swapaxes(-1, -2).astype(q.dtype)  # noqa: E731
        dq += _product(dlogits, own_k)
        dk += _put(own, _product(turned(dlogits), q))
        dv += _put(own, _product(turned(weights), grad.astype(v.dtype)))
        return dq, dk, dv

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    grads = jax.lax.fori_loop(0, lists.longest, step, zeros)
    return *(x.astype(y.dtype) for x, y in zip(grads, (q, k, v))), None


_attend.defvjp(_forward, _backward)


def _nth(lists: _Lists, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """own [B, N, M] float32, 1 at the n-th tile of each list, and what is added to logits [B, N, 1, 1, t, t]."""
    at_BN = jax.lax.dynamic_index_in_dim(lists.keys, n, axis=2, keepdims=False)
    flat = lambda x_BNt: x_BNt.reshape(at_BN.size, -1)  # noqa: E731
    keys = jax.tree.map(lambda x: jnp.take_along_axis(x, at_BN[:, :, None], axis=1), lists.spans)
    seen = visible(*(jax.tree.map(flat, x) for x in (lists.spans, keys)))
    mask = jnp.where(seen, 0.0, MASKED).reshape(*at_BN.shape, 1, 1, *seen.shape[1:])
    return jax.nn.one_hot(at_BN, lists.keys.shape[2]), mask


def _pick(own_BNM: jax.Array, x_BM: jax.Array) -> jax.Array:
    """[B, N, ...]: of x [B, M, ...] the tiles that are marked; a product, exact, and faster than to gather them."""
    picked = _product(own_BNM.astype(x_BM.dtype), x_BM.reshape(*x_BM.shape[:2], -1))
    return picked.reshape(x_BM.shape).astype(x_BM.dtype)


def _put(own_BNM: jax.Array, x_BN: jax.Array) -> jax.Array:
    """[B, M, ...] float32: sums over the tiles of queries, at the tiles of keys that are marked."""
    return _product(own_BNM.swapaxes(1, 2), x_BN.reshape(*x_BN.shape[:2], -1)).reshape(x_BN.shape)


def _logits(q_BNGQK: jax.Array, k_BNGtK: jax.Array, mask: jax.Array) -> jax.Array:
    logits_BNGQt = _product(q_BNGQK, k_BNGtK.swapaxes(-1, -2))
    t = k_BNGtK.shape[-2]
    return (logits_BNGQt.reshape(*logits_BNGQt.shape[:3], -1, t, t) + mask).reshape(logits_BNGQt.shape)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
