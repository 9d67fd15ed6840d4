"""The lightning indexer in Pallas kernels for TPUs: which keys each query sees, and what the indexer learns from them.

`choose` makes the index scores of a block of queries in vector memory, as integers that have their order, and finds the
top_k-th of each query bit by bit; of equal ones the earlier keys are taken, as in `latent_attention.select`, the twin.
`loss` is `latent_attention.index_loss`: the weights of each head are made once more from the logits' sums, block by
block, and in its backward pass the gradient of the scores goes to the indexer's inputs where it is made.

Source: DeepSeek-V3.2 (arXiv 2512.02556, section 2.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from glmv_jax.kernels.selected import (
    UNSEEN,
    Chosen,
    Ref,
    block,
    call,
    chosen,
    dot,
    dot_t,
    estimate,
    last_needed,
    reach,
)
from glmv_jax.kernels.span import Span

_ROWS = 16 << 20  # bytes of the scores of a block of queries, of which vector memory holds two
_TINY = 1e-37


def queries_at_once(keys: int) -> int:
    """Of `choose`: so many that their scores of all keys, four bytes each, are `_ROWS`; 0 where fewer than 32 are, of
    more than 128K keys."""
    found = _ROWS // (4 * keys)
    return next((n for n in (128, 64, 32) if n <= found), 0)


def ordered(bits: jax.Array) -> jax.Array:
    """From the bits of float32 numbers integers that are as large as these, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def scores(order: jax.Array) -> jax.Array:
    """The scores that `Chosen.order` stands for."""
    return jax.lax.bitcast_convert_type(ordered(order), jnp.float32)


def choose(index: Any, query: Span, key: Span, top_k: int, interpret: bool = False) -> Chosen:
    """For each query the top_k visible keys of highest index score, all where there are fewer. Without a gradient.

    index: `latent_attention.Index`; query, key: spans in order with slots. T and S are whole 128; J K too on a TPU.
    """
    q, w, k = map(jax.lax.stop_gradient, index[:3])
    (B, T, J, K), S = q.shape, k.shape[1]
    bq, bk = min(queries_at_once(S), block(T, 128)), block(S)
    needed = reach(query.slots, bq, bk)
    segments = jnp.broadcast_to(query.segments, (B, T))[..., None], jnp.broadcast_to(key.segments, (B, S))[:, None]
    body = functools.partial(_choose, top_k=top_k, J=J, K=K, S=S, bk=bk)
    of_query = lambda n: pl.BlockSpec((None, bq, n), lambda b, i, j, *_: (b, i, 0))  # noqa: E731
    of_key = lambda b, i, j, reach: (b, last_needed(reach, i, j), 0)  # noqa: E731
    shape = lambda n, dtype: jax.ShapeDtypeStruct((B, T, n), dtype)  # noqa: E731
    given = q.reshape(B, T, J * K), w, k, *segments, jnp.broadcast_to(query.slots, (B, T))[..., None]
    found = call(
        body, (B, T // bq, S // bk),
        [of_query(J * K), of_query(J), pl.BlockSpec((None, bk, K), of_key), of_query(1),
         pl.BlockSpec((None, 1, bk), lambda b, i, j, reach: (b, 0, last_needed(reach, i, j))), of_query(1)],
        [of_query(S), of_query(1), of_query(1), of_query(1)],
        [shape(S, jnp.int32), shape(1, jnp.int32), shape(1, jnp.int32), shape(1, jnp.float32)], [(bq, bk)],
        estimate(1, q[:, :, :1].swapaxes(1, 2), k[:, None], J * K, given, shape(S, jnp.int32)), interpret,
        "index_choose",
    )(needed, *given)  # fmt: skip
    return Chosen(*found)


def _choose(
    reach: Ref, q: Ref, w: Ref, k: Ref, q_segment: Ref, k_segment: Ref, slot: Ref, order: Ref, last: Ref, cut: Ref,
    total: Ref, sums: Ref, *, top_k: int, J: int, K: int, S: int, bk: int,
) -> None:  # fmt: skip
    i, j = pl.program_id(1), pl.program_id(2)
    here = pl.ds(pl.multiple_of(j * bk, bk), bk)

    @pl.when(j < reach[i])
    def _() -> None:
        found = _scores_of(q, w, k, sums, J, K)
        bits = jax.lax.bitcast_convert_type(jnp.where(found == 0, 0.0, found), jnp.int32)  # of two zeros one
        at = j * bk + jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
        visible = (q_segment[...] == k_segment[...]) & (at <= slot[...])
        order[:, here] = jnp.where(visible, ordered(bits), UNSEEN)

    @pl.when(j >= reach[i])
    def _() -> None:
        order[:, here] = jnp.full((order.shape[0], bk), UNSEEN, jnp.int32)

    @pl.when(j == S // bk - 1)
    def _() -> None:
        last[...], cut[...], total[...] = _threshold(order, reach[i], top_k, S, bk)


def _scores_of(q: Ref, w: Ref, k: Ref, sums: Ref, J: int, K: int) -> jax.Array:
    """[bq, bk]: sum_j w_j relu(q_j k) / sqrt(J K). sums: room for it."""
    sums[...] = jnp.zeros_like(sums)

    def add(j: jax.Array, _: Any) -> None:
        sums[...] += _column(w, j) * jnp.maximum(dot_t(q[:, _of_head(j, K)], k[...]), 0.0)

    # A loop, here and in the gradient: what XLA takes to compile a kernel grows with its operations, and 32 heads one
    # after the other were most of it, in every layer that is compiled.
    jax.lax.fori_loop(0, J, add, None)
    return sums[...] * (J * K) ** -0.5


def _of_head(j: jax.Array, width: int) -> Any:
    return pl.ds(pl.multiple_of(j * width, width), width)


def _column(ref: Ref, j: jax.Array) -> jax.Array:
    """[n, 1]: column j. Columns cannot be numbered while a kernel runs, unless in whole 128."""
    return jnp.where(_is_column(ref, j), ref[...], 0.0).sum(-1, keepdims=True)


def _is_column(ref: Ref, j: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, ref.shape, 1) == j


def _threshold(order: Ref, blocks: jax.Array, top_k: int, S: int, bk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(last, cut, total), see `Chosen`, from the order [bq, S] of keys, of which `blocks` blocks are looked at."""
    rows = order.shape[0]

    def over(start: jax.Array, step: Callable) -> jax.Array:
        def one(c: jax.Array, carry: jax.Array) -> jax.Array:
            first = pl.multiple_of(c * bk, bk)
            return step(carry, order[:, pl.ds(first, bk)], first)

        return jax.lax.fori_loop(0, blocks, one, start)

    def count(which: Callable) -> jax.Array:
        """[bq, 1]; counted in float32, which is exact here, as lanes add faster so."""
        added = lambda n, x, first: n + jnp.where(which(x, first), 1.0, 0.0).sum(-1, keepdims=True)  # noqa: E731
        return over(jnp.zeros((rows, 1), jnp.float32), added)

    def bit(b: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | jnp.left_shift(jnp.int32(1), 31 - b)
        limit = tried ^ jnp.int32(UNSEEN)
        return jnp.where(count(lambda x, _: x >= limit) >= top_k, tried, found)

    last = jax.lax.fori_loop(0, 32, bit, jnp.zeros((rows, 1), jnp.int32)) ^ jnp.int32(UNSEEN)
    all_seen = last == UNSEEN
    room = top_k - count(lambda x, _: x > last)
    excess = jnp.where(all_seen, 0.0, count(lambda x, _: x == last) - room)

    def position(b: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | jnp.left_shift(jnp.int32(1), S.bit_length() - 1 - b)

        def equal_before(x: jax.Array, first: jax.Array) -> jax.Array:
            at = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            return (x == last) & (at < tried)

        return jnp.where(count(equal_before) <= room, tried, found)

    ties = jnp.where(jnp.max(excess) > 0, S.bit_length(), 0)  # the search for equal keys is seldom needed
    cut = jax.lax.fori_loop(0, ties, position, jnp.where(jnp.max(excess) > 0, 0, S) + jnp.zeros((rows, 1), jnp.int32))
    cut = jnp.where(all_seen, 0, cut)

    highest = over(jnp.full((rows, 1), UNSEEN, jnp.int32), lambda n, x, _: jnp.maximum(n, _highest(x)))
    highest = scores(highest)
    summed = lambda n, x, first: n + jnp.where(  # noqa: E731
        chosen(x, last, cut, first), jnp.exp(scores(x) - highest), 0.0
    ).sum(-1, keepdims=True)
    return last, cut, highest + jnp.log(over(jnp.zeros((rows, 1), jnp.float32), summed))


def _highest(order: jax.Array) -> jax.Array:
    """[bq, 1]; of floats, as lanes compare."""
    seen = order > UNSEEN
    bits = jax.lax.bitcast_convert_type(jnp.where(seen, scores(order), -jnp.inf).max(-1, keepdims=True), jnp.int32)
    return ordered(bits)


# --- the loss ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def loss(
    index: Any, q_BHTK: jax.Array, k_BHSK: jax.Array, total_BHT: jax.Array, keys: Chosen, slots_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """[B, T]: KL(attention, mean over heads || softmax of the index scores), over the chosen keys. Only `index` has a
    gradient. q, k: scaled queries and keys of all heads; total: what `selected.attend` says of them."""
    del index
    return _learn(None, None, q_BHTK, k_BHSK, total_BHT, keys, slots_BT, interpret)[..., 0]


def _forward(
    index: Any, q: jax.Array, k: jax.Array, total: jax.Array, keys: Chosen, slots_BT: jax.Array, interpret: bool
) -> tuple:
    return loss(index, q, k, total, keys, slots_BT, interpret), (index, q, k, total, keys, slots_BT)


def _backward(interpret: bool, saved: tuple, given_BT: jax.Array) -> tuple:
    index, q, k, total, keys, slots_BT = saved
    dq, dw, dk = _learn(index, given_BT, q, k, total, keys, slots_BT, interpret)
    d_index = type(index)(dq.reshape(index.q.shape), dw.astype(index.w.dtype), dk.astype(index.k.dtype))
    return d_index, None, None, None, None, None


loss.defvjp(_forward, _backward)


def _learn(
    index: Any, given_BT: Any, q: jax.Array, k: jax.Array, total: jax.Array, keys: Chosen,
    slots_BT: jax.Array, interpret: bool,
) -> Any:  # fmt: skip
    """The loss [B, T, 1]; or, with its gradient given, that of the index: q [B, T, J K], w, k in float32.

    The gradient of k is written by block of queries and summed behind the kernel: [T / 256, S, K] is half of what the
    scores of all pairs take, where a row's own [S, K] in vector memory would bound S, and bind the blocks to one core.
    """
    (B, H, T, K), S = q.shape, k.shape[2]
    bq, bk = block(T, 512 if index is None else 256), block(S)

    def of_head(n: int, at: Any, size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size, n), lambda b, i, j, h, reach: (b, h, at(i, j, reach), 0))

    mine, theirs = (lambda i, j, reach: i), (lambda i, j, reach: last_needed(reach, i, j))
    of_query = lambda n: pl.BlockSpec((None, bq, n), lambda b, i, j, h, *_: (b, i, 0))  # noqa: E731
    pairs = pl.BlockSpec((None, bq, bk), lambda b, i, j, h, reach: (b, i, theirs(i, j, reach)))
    ins = [of_head(K, mine, bq), of_head(K, theirs, bk), of_head(1, mine, bq), pairs, *[of_query(1)] * 3]
    args = [q, k, total[..., None], *keys]
    grid, needed = (B, T // bq, S // bk, H), reach(slots_BT, bq, bk)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    if index is None:
        return call(
            functools.partial(_loss_of_block, H=H, bk=bk), grid, ins, of_query(1), f32(B, T, 1), [(bq, bk)],
            estimate(1, q, k, K, args), interpret, "index_loss",
        )(needed, *args)  # fmt: skip
    J, C = index.q.shape[2:]
    args += [index.q.reshape(B, T, J * C), index.w, index.k, given_BT[..., None]]
    of_key = pl.BlockSpec((None, bk, C), lambda b, i, j, h, reach: (b, theirs(i, j, reach), 0))
    ins += [of_query(J * C), of_query(J), of_key, of_query(1)]
    of_both = pl.BlockSpec((None, None, bk, C), lambda b, i, j, *_: (b, i, j, 0))
    shapes = [jax.ShapeDtypeStruct((B, T, J * C), index.q.dtype), f32(B, T, J), f32(B, T // bq, S, C)]
    of_index = estimate(3, index.q[:, :, :1].swapaxes(1, 2), index.k[:, None], J * C)
    cost = estimate(1, q, k, K, args, shapes)
    cost = pl.CostEstimate(cost.flops + of_index.flops, cost.transcendentals, cost.bytes_accessed)
    dq, dw, dk = call(
        functools.partial(_gradient_of_block, H=H, J=J, C=C, bk=bk), grid, ins, [of_query(J * C), of_query(J), of_both],
        shapes, [(bq, bk), (bq, J * C)], cost, interpret, "index_loss_backward",
    )(needed, *args)  # fmt: skip
    return dq, dw, dk.sum(axis=1)


def _target(q: Ref, k: Ref, total: Ref, seen: Any, target: Ref, h: Any, H: int) -> None:
    """Adds the weights of this head to those of the others of a block."""
    shares = jnp.where(seen, jnp.exp(dot_t(q[...], k[...]) - total[...]), 0.0) / H

    @pl.when(h == 0)
    def _() -> None:
        target[...] = shares

    @pl.when(h > 0)
    def _() -> None:
        target[...] += shares


def _loss_of_block(
    reach: Ref, q: Ref, k: Ref, total: Ref, order: Ref, last: Ref, cut: Ref, index_total: Ref, out: Ref, target: Ref, *,
    H: int, bk: int,
) -> None:  # fmt: skip
    i, j, h = (pl.program_id(n) for n in (1, 2, 3))

    @pl.when((j == 0) & (h == 0))
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    @pl.when(j < reach[i])
    def _() -> None:
        seen = chosen(order[...], last[...], cut[...], j * bk)
        _target(q, k, total, seen, target, h, H)

        @pl.when(h == H - 1)
        def _() -> None:
            t = target[...]
            parts = t * (jnp.log(jnp.maximum(t, _TINY)) - (scores(order[...]) - index_total[...]))
            out[...] += jnp.where(seen & (t > 0), parts, 0.0).sum(-1, keepdims=True)


def _gradient_of_block(
    reach: Ref, q: Ref, k: Ref, total: Ref, order: Ref, last: Ref, cut: Ref, index_total: Ref, iq: Ref, iw: Ref,
    ik: Ref, given: Ref, dq: Ref, dw: Ref, dk: Ref, target: Ref, acc: Ref, *, H: int, J: int, C: int, bk: int,
) -> None:  # fmt: skip
    i, j, h = (pl.program_id(n) for n in (1, 2, 3))

    @pl.when(h == 0)
    def _() -> None:
        dk[...] = jnp.zeros_like(dk)  # of blocks that no query here looks at too

    @pl.when((j == 0) & (h == 0))
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        dw[...] = jnp.zeros_like(dw)

    @pl.when(j < reach[i])
    def _() -> None:
        seen = chosen(order[...], last[...], cut[...], j * bk)
        _target(q, k, total, seen, target, h, H)

        @pl.when(h == H - 1)
        def _() -> None:
            shares = jnp.exp(jnp.minimum(scores(order[...]) - index_total[...], 0.0))
            target[...] = jnp.where(seen, (shares - target[...]) * given[...], 0.0) * (J * C) ** -0.5

            def add(n: jax.Array, _: Any) -> None:
                of_head, ds = _of_head(n, C), target[...]
                logits = dot_t(iq[:, of_head], ik[...])
                sums = (ds * jnp.maximum(logits, 0.0)).sum(-1, keepdims=True)
                dw[...] += jnp.where(_is_column(dw, n), sums, 0.0)
                d_logits = jnp.where(logits > 0, ds * _column(iw, n), 0.0).astype(ik.dtype)
                acc[:, of_head] += dot(d_logits, ik[...])
                dk[...] += dot(d_logits.T, iq[:, of_head])

            jax.lax.fori_loop(0, J, add, None)

    @pl.when((j == pl.num_programs(2) - 1) & (h == H - 1))
    def _() -> None:
        dq[...] = acc[...].astype(dq.dtype)
