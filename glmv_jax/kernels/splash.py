"""Attention of a row to itself by JAX's Pallas kernels for TPUs ("splash"), which write no logits to memory.

`attention.plain` is the twin. Forward and backward are kernels; blocks that a causal mask leaves empty are not run, and
segments are compared inside. The compiler cannot partition a kernel: under a mesh each device runs its own on its rows,
its heads and, where rows are split, its queries, for which it gathers the keys and values of the row.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

from glmv_jax.kernels.span import Span
from glmv_jax.parallel import context, remat, rules

# Positions a block of queries and of keys, the largest that divides. With 512 queries a key that is read takes part in
# 512 multiply-adds a number, more than any TPU's memory needs to keep up; and the float32 logits of a block, 1 MB, with
# what else the backward kernels hold, stay within the 16 MB of a v5e's vector memory.
BLOCKS = (512, 384, 256, 128)
# Positions of a row from which the kernels are taken. Each block costs them a third of a microsecond beside its work
# (JAX's Pallas documentation), in which a TPU's memory moves the scores of 256 x 256 about once.
SHORTEST = 256
_UNUSED = -1  # the segment of positions that fill up the last block


def supported(q_BTHK: jax.Array, k_BSGK: jax.Array, query: Span, key: Span) -> bool:
    """Whether the kernels take these: on a TPU, queries and keys the same positions in order (`Span.in_order`: with
    another mask, as of a cache or of branches, blocks could not be chosen while tracing), `SHORTEST` of them or more,
    and rows, heads and positions that divide over the mesh."""
    in_order = query.in_order is not None and key.in_order is not None and query.branches is None
    long_enough = q_BTHK.shape[1] == k_BSGK.shape[1] >= SHORTEST
    return rules.device().platform == "tpu" and in_order and long_enough and _divides(q_BTHK, k_BSGK)


def _divides(q_BTHK: jax.Array, k_BSGK: jax.Array) -> bool:
    if (mesh := rules.active_mesh()) is None:
        return True
    names = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
    for x, where in zip((q_BTHK, k_BSGK), (context.spec(*n) for n in names)):
        over = [math.prod(mesh.shape[axis] for axis in rules.entry_axes(entry)) for entry in where]
        if any(size % n for size, n in zip(x.shape, over)):
            return False
    n = context.parts()  # chunks of whole blocks; n n is what the kernels' masks ask for
    return n == 1 or q_BTHK.shape[1] % math.lcm(n * n, 2 * n * BLOCKS[-1]) == 0


def splash(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query: Span, key: Span, interpret: bool = False
) -> jax.Array:
    """As `attention.plain`, of spans that are in order. interpret: run by the interpreter, for tests elsewhere."""
    T, n = q_BTHK.shape[1], context.parts()
    fill = -T % BLOCKS[-1] if n == 1 else 0
    q_BTHK *= q_BTHK.shape[-1] ** -0.5  # the kernels do not scale
    q, k, v = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (q_BTHK, k_BSGK, v_BSGK))
    q_ids, k_ids = (jnp.pad(x.segments, ((0, 0), (0, fill)), constant_values=_UNUSED) for x in (query, key))
    causal = query.slots is not None
    kernel = _kernel(T + fill, q_BTHK.shape[-1], causal, interpret)
    mesh = rules.active_mesh()
    if mesh is None or mesh.size == 1:
        return _rows(kernel, q, k, v, q_ids, k_ids)[:, :T]

    def own(
        kernel: pallas.SplashAttentionKernel, q: jax.Array, k: jax.Array, v: jax.Array, q_ids: jax.Array,
        k_ids: jax.Array,
    ) -> jax.Array:  # fmt: skip
        if n > 1:
            k, v, k_ids = (context.gathered(x) for x in (k, v, k_ids))
        return _rows(kernel, q, k, v, q_ids, k_ids)

    q_spec, kv_spec = (context.spec("batch", "length", heads, None) for heads in ("heads", "kv_heads"))
    row = context.spec("batch", "length")
    queries = PartitionSpec(None, context.AXIS if n > 1 and causal else None)
    parts = kernel.manual_sharding_spec(NamedSharding(mesh, queries))
    where = parts, q_spec, kv_spec, kv_spec, row, row
    return context.per_device(own, where, q_spec, kernel=True)(kernel, q, k, v, q_ids, k_ids)[:, :T]


def _kernel(T: int, K: int, causal: bool, interpret: bool) -> pallas.SplashAttentionKernel:
    """For the keys of a row and, if causal, its queries in the devices' order: tables, split like these, tell which
    blocks are to be run. Otherwise for a device's queries, as all see the same."""
    n = context.parts()
    if causal:
        mask = masks.CausalMask((T, T), shard_count=n)
        mask.q_sequence = context.order(T).astype(np.int32)
    else:
        mask = masks.FullMask((T // n, T))
    chunk = T if n == 1 else T // (2 * n)
    own, all_ = (next(b for b in BLOCKS if length % b == 0) for length in (chunk, T))
    # Heads of 64 fill half of a vector register's lanes: there positions lie along these.
    layout = pallas.QKVLayout.HEAD_DIM_MINOR if K % 128 == 0 else pallas.QKVLayout.SEQ_MINOR
    sizes = pallas.BlockSizes(
        block_q=own, block_kv=all_, block_q_dkv=own, block_kv_dkv=all_, block_q_dq=own, block_kv_dq=all_,
        q_layout=layout, k_layout=layout, v_layout=layout,
    )  # fmt: skip
    shards = n if causal else 1
    return pallas.make_splash_mha(
        masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=shards, interpret=interpret,
        residual_checkpoint_name=remat.ATTENTION,
    )  # one mask stands for all heads


def _rows(
    kernel: pallas.SplashAttentionKernel, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, q_ids_BT: jax.Array,
    k_ids_BS: jax.Array,
) -> jax.Array:  # fmt: skip
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    own: Any = lambda q, k, v, *ids: kernel(q, k, v, pallas.SegmentIds(*ids))  # noqa: E731
    out_BHTK = jax.vmap(own)(q, k, v, q_ids_BT, k_ids_BS)
    return out_BHTK.swapaxes(1, 2)
