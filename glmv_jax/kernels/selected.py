"""Attention of a row to keys chosen for each query, in Pallas kernels for TPUs that write no weights to memory.

Which keys a query sees is told by a few numbers in place of a mask. `Chosen`: the index scores of all keys as integers
that have their order, the lowest of them that is seen, and before which position one as low still is. `Forked`: the
segments and branches of queries and keys, and the queries' places. Blocks of keys behind all queries of a block are not
run. The twins are `latent_attention.expanded` with the mask of `chosen`, and `attention.plain`.

The backward pass is that of FlashAttention-2 (arXiv 2307.08691, algorithm 2), in one kernel for the queries and one for
keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glmv_jax.parallel.remat import ATTENTION

UNSEEN = -(1 << 31)  # the order of keys that a query may not see; below that of every score
_MASKED = -2.0e38
_BLOCKS = (512, 384, 256, 128)
Ref: TypeAlias = Any  # an array in the memory of a kernel that runs
_VMEM = 64 << 20  # bytes of vector memory that a kernel may ask for: v4 and later have it


class Chosen(NamedTuple):
    """The keys that each query sees: those whose order is above `last`, and of equal ones those before `cut`.

    order: int32 [B, T, S], UNSEEN where a key is not visible; last, cut: int32 [B, T, 1]; total: float32 [B, T, 1],
    logsumexp of the index scores of the chosen keys.
    """

    order: jax.Array
    last: jax.Array
    cut: jax.Array
    total: jax.Array

    def told(self) -> tuple[jax.Array, ...]:
        """What the kernels read: by pair, by query or by key."""
        return self[:3]

    @staticmethod
    def seen(order: jax.Array, last: jax.Array, cut: jax.Array, first: Any) -> jax.Array:
        """Of a block of queries and keys, the first of which is key number `first`."""
        return chosen(order, last, cut, first)


class Forked(NamedTuple):
    """The keys of a query: of its segment, at or before its slot, of branch 0 or its own; those of `span.Span`.

    segment, branch, slot: int32 [B, T, 1], of queries; key_segment, key_branch: int32 [B, 1, S], of keys in order.
    """

    segment: jax.Array
    branch: jax.Array
    slot: jax.Array
    key_segment: jax.Array
    key_branch: jax.Array

    def told(self) -> tuple[jax.Array, ...]:
        return tuple(self)

    @staticmethod
    def seen(
        segment: jax.Array, branch: jax.Array, slot: jax.Array, key_segment: jax.Array, key_branch: jax.Array,
        first: Any,
    ) -> jax.Array:  # fmt: skip
        at = first + jax.lax.broadcasted_iota(jnp.int32, (segment.shape[0], key_segment.shape[1]), 1)
        mine = (key_branch == 0) | (key_branch == branch)
        return (segment == key_segment) & mine & (at <= slot)


def chosen(order: jax.Array, last: jax.Array, cut: jax.Array, first: Any = 0) -> jax.Array:
    """Which of these keys are seen; `first`: the position of the first."""
    at = first + jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    return (order > last) | ((order == last) & (at < cut))


def block(length: int, most: int = _BLOCKS[0]) -> int:
    """Positions at a time, for a length in whole 128."""
    return next(b for b in _BLOCKS if b <= most and length % b == 0)


def reach(slots_BT: jax.Array, queries: int, keys: int) -> jax.Array:
    """[T / queries]: how many blocks of keys each block of queries looks at, by the slots that all rows have alike."""
    return slots_BT[0].reshape(-1, queries).max(axis=1).astype(jnp.int32) // keys + 1


def estimate(products: int, queries: jax.Array, keys: jax.Array, width: float, *moved: Any) -> pl.CostEstimate:
    """Of products of queries [B, H, T, K] with keys before them [B, H, S, K], as many times `width` wide, to show in
    compiled programs: of rows of blocks on and under the diagonal. Devices that share a row have as much each."""
    B, H, T, _ = queries.shape
    S = keys.shape[2]
    blocks = S // block(S)
    pairs = B * H * T * S * (blocks + 1) // (2 * blocks)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moved))
    return pl.CostEstimate(flops=int(2 * products * pairs * width), transcendentals=pairs, bytes_accessed=size)


def attend(
    q_BHTK: jax.Array, k_BGSK: jax.Array, v_BGSV: jax.Array, keys: Chosen | Forked, slots_BT: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out [B, H, T, V], logsumexp of the logits [B, H, T] float32, which has no gradient) of scaled queries, of which
    each run of H / G heads has one of keys and values.

    Each query sees a key, and T, S are whole 128, K and V too on a TPU. slots_BT: of the queries; keys are in order.
    """
    out, total = _attend(q_BHTK, k_BGSK, v_BGSV, keys, slots_BT, interpret)
    return out, jax.lax.stop_gradient(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: Chosen, slots_BT: jax.Array, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, keys, slots_BT, interpret)[0]


class _Grid(NamedTuple):
    """Blocks of queries and keys, and the blocks of arrays that a step of (row, head, query block, key block) has.
    share: heads that have keys in common."""

    B: int
    H: int
    share: int
    bq: int
    bk: int
    nq: int
    nk: int

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array) -> _Grid:
        (B, H, T, _), S = q.shape, k.shape[2]
        bq, bk = block(T), block(S)
        return cls(B, H, H // k.shape[1], bq, bk, T // bq, S // bk)

    def specs(self, K: int, V: int, keys: Chosen | Forked, where: Callable) -> dict[str, Any]:
        """where(step of the grid) -> (row, head, query block, key block that is read). Of "keys" a list."""

        def spec(shape: tuple[int | None, ...], pick: Callable) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *step: pick(*where(*step)))

        of_q = lambda n: spec((None, None, self.bq, n), lambda b, h, i, j: (b, h, i, 0))  # noqa: E731
        of_k = lambda n: spec((None, None, self.bk, n), lambda b, h, i, j: (b, h // self.share, j, 0))  # noqa: E731
        by_head = lambda n: spec((None, None, self.bk, n), lambda b, h, i, j: (b, h, j, 0))  # noqa: E731
        told = {
            (False, True): spec((None, self.bq, 1), lambda b, h, i, j: (b, i, 0)),
            (True, False): spec((None, 1, self.bk), lambda b, h, i, j: (b, 0, j)),
            (False, False): spec((None, self.bq, self.bk), lambda b, h, i, j: (b, i, j)),
        }
        asked = [told[x.shape[1] == 1, x.shape[2] == 1] for x in keys.told()]
        return {"q": of_q(K), "o": of_q(V), "k": of_k(K), "v": of_k(V), "dk": by_head(K), "dv": by_head(V),
                "one": of_q(1), "keys": asked}  # fmt: skip


def call(
    body: Callable, grid: tuple[int, ...], ins: list[pl.BlockSpec], outs: Any, shapes: Any,
    scratch: list[tuple[int, ...]], cost: pl.CostEstimate, interpret: bool, name: str,
) -> Callable:  # fmt: skip
    """A kernel that is told `reach` before its arguments. The first two dimensions of the grid may be split over the
    cores of a chip. outs, shapes: of its results, one or a list."""
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=ins, out_specs=outs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple("parallel" if axis < 2 else "arbitrary" for axis in range(len(grid))),
            vmem_limit_bytes=_VMEM,
        ),
        cost_estimate=cost, interpret=interpret, name=name,
    )  # fmt: skip


def last_needed(reach_ref: Any, i: Any, j: Any) -> Any:
    """The block of keys that is there at step j: behind the last that is needed nothing new is read."""
    return jnp.minimum(j, reach_ref[i] - 1)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: Any, slots_BT: jax.Array, interpret: bool
) -> tuple:
    g, K, V = _Grid.of(q, k), q.shape[-1], v.shape[-1]
    at = g.specs(K, V, keys, lambda b, h, i, j, reach: (b, h, i, last_needed(reach, i, j)))

    def body(reach: Ref, q: Ref, k: Ref, v: Ref, *refs: Ref) -> None:
        *told, out, total, high, weight, acc = refs
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _() -> None:
            high[...] = jnp.full_like(high, _MASKED)
            weight[...] = jnp.zeros_like(weight)
            acc[...] = jnp.zeros_like(acc)

        @pl.when(j < reach[i])
        def _() -> None:
            logits = jnp.where(keys.seen(*[x[...] for x in told], j * g.bk), dot_t(q[...], k[...]), _MASKED)
            higher = jnp.maximum(high[...], logits.max(axis=-1, keepdims=True))
            fade = jnp.exp(high[...] - higher)
            shares = jnp.exp(logits - higher)
            weight[...] = fade * weight[...] + shares.sum(axis=-1, keepdims=True)
            acc[...] = fade * acc[...] + dot(shares.astype(v.dtype), v[...])
            high[...] = higher

        @pl.when(j == g.nk - 1)
        def _() -> None:
            out[...] = (acc[...] / weight[...]).astype(out.dtype)
            total[...] = high[...] + jnp.log(weight[...])

    shapes = [jax.ShapeDtypeStruct((*q.shape[:3], n), dtype) for n, dtype in ((V, q.dtype), (1, jnp.float32))]
    run = call(
        body, (g.B, g.H, g.nq, g.nk), [at["q"], at["k"], at["v"], *at["keys"]], [at["o"], at["one"]], shapes,
        [(g.bq, 1), (g.bq, 1), (g.bq, V)], estimate(1, q, k, K + V, q, k, v, keys.told()), interpret,
        "selected_forward",
    )  # fmt: skip
    out, total = run(reach(slots_BT, g.bq, g.bk), q, k, v, *keys.told())
    out, total = (checkpoint_name(x, ATTENTION) for x in (out, total[..., 0]))
    return (out, total), (q, k, v, keys, slots_BT, out, total)


def _backward(interpret: bool, saved: tuple, given: tuple) -> tuple:
    q, k, v, keys, slots_BT, out, total = saved
    g_out = given[0]
    g, K, V = _Grid.of(q, k), q.shape[-1], v.shape[-1]
    inner = (out.astype(jnp.float32) * g_out.astype(jnp.float32)).sum(-1, keepdims=True)
    args = (q, k, v, *keys.told(), g_out, total[..., None], inner)
    needed = reach(slots_BT, g.bq, g.bk)

    def gradient_of_logits(
        q: Ref, k: Ref, v: Ref, told: list, g_out: Ref, total: Ref, inner: Ref, j: Ref
    ) -> tuple[jax.Array, jax.Array]:
        """(weights, gradient of the logits) of a block."""
        seen = keys.seen(*(x[...] for x in told), j * g.bk)
        shares = jnp.where(seen, jnp.exp(dot_t(q[...], k[...]) - total[...]), 0.0)
        return shares, shares * (dot_t(g_out[...], v[...]) - inner[...])

    def ins(at: dict[str, Any]) -> list[pl.BlockSpec]:
        return [at["q"], at["k"], at["v"], *at["keys"], at["o"], at["one"], at["one"]]

    def of_queries(reach: Ref, q: Ref, k: Ref, v: Ref, *refs: Ref) -> None:
        *told, g_out, total, inner, dq, acc = refs
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _() -> None:
            acc[...] = jnp.zeros_like(acc)

        @pl.when(j < reach[i])
        def _() -> None:
            _, d_logits = gradient_of_logits(q, k, v, told, g_out, total, inner, j)
            acc[...] += dot(d_logits.astype(k.dtype), k[...])

        @pl.when(j == g.nk - 1)
        def _() -> None:
            dq[...] = acc[...].astype(dq.dtype)

    at = g.specs(K, V, keys, lambda b, h, i, j, reach: (b, h, i, last_needed(reach, i, j)))
    like = lambda x: jax.ShapeDtypeStruct((*q.shape[:2], *x.shape[2:]), x.dtype)  # noqa: E731
    dq = call(
        of_queries, (g.B, g.H, g.nq, g.nk), ins(at), at["q"], like(q), [(g.bq, K)],
        estimate(1, q, k, 2 * K + V, args), interpret, "selected_backward_q",
    )(needed, *args)  # fmt: skip

    def of_keys(reach: Ref, q: Ref, k: Ref, v: Ref, *refs: Ref) -> None:
        *told, g_out, total, inner, dk, dv, acc_k, acc_v = refs
        j, i = pl.program_id(2), pl.program_id(3)

        @pl.when(i == 0)
        def _() -> None:
            acc_k[...] = jnp.zeros_like(acc_k)
            acc_v[...] = jnp.zeros_like(acc_v)

        @pl.when(j < reach[i])
        def _() -> None:
            shares, d_logits = gradient_of_logits(q, k, v, told, g_out, total, inner, j)
            acc_v[...] += dot(shares.T.astype(g_out.dtype), g_out[...])
            acc_k[...] += dot(d_logits.T.astype(q.dtype), q[...])

        @pl.when(i == g.nq - 1)
        def _() -> None:
            dk[...] = acc_k[...].astype(dk.dtype)
            dv[...] = acc_v[...].astype(dv.dtype)

    at = g.specs(K, V, keys, lambda b, h, j, i, reach: (b, h, i, j))
    dk, dv = call(
        of_keys, (g.B, g.H, g.nk, g.nq), ins(at), [at["dk"], at["dv"]], [like(k), like(v)], [(g.bk, K), (g.bk, V)],
        estimate(1, q, k, 2 * K + 2 * V, args), interpret, "selected_backward_kv",
    )(needed, *args)  # fmt: skip
    return dq, _of_groups(dk, g.share), _of_groups(dv, g.share), None, None


_attend.defvjp(_forward, _backward)


def _of_groups(x_BHSK: jax.Array, share: int) -> jax.Array:
    """Summed over the heads that share keys, in float32."""
    if share == 1:
        return x_BHSK
    B, H, S, K = x_BHSK.shape
    return x_BHSK.reshape(B, H // share, share, S, K).sum(2, dtype=jnp.float32).astype(x_BHSK.dtype)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def dot_t(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
