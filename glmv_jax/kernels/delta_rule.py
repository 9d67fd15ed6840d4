"""The gated delta rule of Kimi's linear attention (KDA): a state that forgets channel by channel, and into which a
position writes what its key does not yet find there.

    S_t = diag(exp g_t) S_{t-1} + beta_t k_t u_t^T,    u_t = v_t - (diag(exp g_t) S_{t-1})^T k_t,    o_t = S_t^T q_t

`delta_rule` reads runs of positions a chunk at a time. With S the state before a chunk, G_i the sum of its g up to i,
A_ij = beta_i sum_d k_id k_jd exp(G_id - G_jd) for j < i, and rows of B and V those of beta k exp(G) and beta v,

    (I + A) U = V - B S

so that a chunk is a few products of matrices, and a scan carries S. A chunk of one position is the recurrence itself:
there is no second form for decoding. Sources: Kimi Linear (arXiv 2510.26692, section 3), DeltaNet in chunks (arXiv
2406.06484), gated (arXiv 2412.06464).

exp(G_i) exp(-G_j) would overflow. Instead positions meet by halves: of 2s neighbours the later s see the earlier s in
one product, the earlier decayed to where the halves meet, the later from there, by exponents that are never above 0.
Going up from s = 1, (I + A)^-1 comes out of the same products, block by block.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64
# A state is the sum of all that was written: products in bfloat16, which are the default of TPUs, would blur it.
_matmul = functools.partial(jnp.matmul, precision="highest")


class Chunk(NamedTuple):
    """What a chunk of C positions does with the state before it, [..., C, X] a head. q: what positions ask of it; w:
    what they find there of their keys, times beta; u: their values but for that; seen [C, C]: what they ask of each
    other; k, decay [K, 1]: how what they write, and the state itself, reach the chunk's end."""

    q: jax.Array
    w: jax.Array
    u: jax.Array
    seen: jax.Array
    k: jax.Array
    decay: jax.Array


def delta_rule(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, segments: jax.Array | None = None,
    state: jax.Array | None = None, chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(o [B, T, H, V], the state after the last position [B, H, K, V]), both float32, which all is computed in.

    q, k: [B, T, H, K], scaled as they are to be. v: [B, T, H, V]. g: [B, T, H, K] logarithms of what is kept, <= 0.
    beta: [B, T, H]; a position with g = 0 and beta = 0 leaves the state as it is.
    segments: [B, T] or [1, T]; a segment begins with an empty state. None: all is one.
    state: before the first position, [B, H, K, V]; None: empty. chunk: a power of two.
    """
    B, T, H, K = k.shape
    C = min(chunk, 1 << (T - 1).bit_length())
    padding = -T % C

    def chunks(x_BTHX: jax.Array) -> jax.Array:
        x = jnp.pad(x_BTHX.astype(jnp.float32), ((0, 0), (0, padding), (0, 0), (0, 0)))
        return x.reshape(B, -1, C, H, x.shape[-1]).transpose(1, 0, 3, 2, 4)  # [chunks, B, H, C, X]

    if segments is None:
        segments = jnp.zeros((1, T), jnp.int32)
    segments = jnp.pad(segments, ((0, 0), (0, padding)), mode="edge")
    segments_NBC = segments.reshape(len(segments), -1, C).swapaxes(0, 1)
    parts = _chunk(*map(chunks, (q, k, v, g, beta[..., None])), segments_NBC)
    before = jnp.zeros((B, H, K, v.shape[-1]), jnp.float32) if state is None else state
    if len(parts.q) == 1:
        after, out = _advance(before, jax.tree.map(lambda x: x[0], parts))
        out = out[None]
    else:
        after, out = jax.lax.scan(_advance, before, parts)
    return out.transpose(1, 0, 3, 2, 4).reshape(B, T + padding, H, -1)[:, :T], after


def _advance(state: jax.Array, c: Chunk) -> tuple[jax.Array, jax.Array]:
    u = c.u - _matmul(c.w, state)
    return c.decay * state + _matmul(c.k.swapaxes(-1, -2), u), _matmul(c.q, state) + _matmul(c.seen, u)


@jax.checkpoint
def _chunk(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, segments_NBC: jax.Array) -> Chunk:
    """Of all chunks at once: leaves [chunks, B, H, C, X], segments [chunks, B, C]."""
    segments = segments_NBC[:, :, None]
    last = segments[..., -1:]
    before = jnp.concatenate([segments[:1, ..., :1], last[:-1]])  # whose the state is
    seen, solved, since, until = _pairs(q, k, g, beta, segments)
    decayed = jnp.where((segments == before)[..., None], jnp.exp(since), 0)
    return Chunk(
        q * decayed,
        _matmul(solved, beta * k * decayed),
        _matmul(solved, beta * v),
        seen,
        k * jnp.where((segments == last)[..., None], jnp.exp(until), 0),
        jnp.where((before == last)[..., None], jnp.exp(since[..., -1:, :]), 0).swapaxes(-1, -2),
    )


def _pairs(q: jax.Array, k: jax.Array, g: jax.Array, beta: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
    """(q_i k_j decayed from j to i where j <= i, and (I + A)^-1), both [..., C, C]: see the head of the file; and the
    sums of g from a chunk's beginning up to a position, and behind it up to the end, both [..., C, K].

    Everything is in blocks of s positions [..., C / s, s, X], of which neighbours are joined. Sums grow with them:
    differences of those over a whole chunk would be as exact as its largest sum, not as they themselves.
    """
    s, C = 1, q.shape[-2]
    since, until = _blocks(g, s), jnp.zeros_like(_blocks(g, s))
    seen = (q * k).sum(-1)[..., None, None]
    solved = jnp.ones_like(seen)
    while s < C:
        (k0, k1), (_, q1), (_, b1), (id0, id1) = (_two(_blocks(x, s)) for x in (k, q, beta, segments[..., None]))
        (since0, since1), (until0, until1) = _two(since), _two(until)
        earlier, later = (k0 * jnp.exp(until0)).swapaxes(-1, -2), jnp.exp(since1)
        same = id1 == id0.swapaxes(-1, -2)
        asked = jnp.where(same, _matmul(q1 * later, earlier), 0)
        a = jnp.where(same, _matmul(b1 * k1 * later, earlier), 0)
        seen = _joined(*_two(seen), asked)
        upper, lower = _two(solved)
        solved = _joined(upper, lower, -_matmul(_matmul(lower, a), upper))
        since, until = (
            jnp.concatenate([since0, since1 + since0[..., -1:, :]], axis=-2),
            jnp.concatenate([until0 + since1[..., -1:, :], until1], axis=-2),
        )
        s *= 2
    return tuple(x[..., 0, :, :] for x in (seen, solved, since, until))


def _blocks(x: jax.Array, s: int) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1, s, x.shape[-1])


def _two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of pairs of neighbouring blocks the earlier ones and the later ones."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def _joined(upper: jax.Array, lower: jax.Array, corner: jax.Array) -> jax.Array:
    """[[upper, 0], [corner, lower]]."""
    above = jnp.concatenate([upper, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
