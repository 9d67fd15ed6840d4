"""Multi-head latent attention over a compressed cache, and the lightning indexer that chooses its keys.

Keys and values of all heads are one latent c [S, C] and one rotated key r [S, R]: k_h = [c W_uk_h, r], v_h = c W_uv_h.
`expanded` makes them and is right for long runs of queries; `absorbed` moves W_uk into the queries and W_uv behind the
sum, so that a key is read once for all heads, and is right for a few queries over a long cache. They are the same
function. On TPUs rows that see themselves, in training and prefill, are expanded, and Pallas kernels (`selected`,
`lightning`; without an indexer `splash`) write no weights to memory. Sources: DeepSeek-V2 (arXiv 2405.04434, section
2.1) and, for the indexer, DeepSeek-V3.2 (arXiv 2512.02556, section 2.1).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.kernels import entries, lightning, selected, splash
from glmv_jax.kernels import pools as pools_lib
from glmv_jax.kernels.span import MASKED, Span, visible
from glmv_jax.parallel import context, rules


class Heads(NamedTuple):
    """Queries q [B, T, H, N] without and r [B, T, H, R] with rotation; weights uk [C, H, N] and uv [C, H, V]."""

    q: jax.Array
    r: jax.Array
    uk: jax.Array
    uv: jax.Array


class Latents(NamedTuple):
    """What all heads share: c [B, S, C] after its norm, r [B, S, R] rotated."""

    c: jax.Array
    r: jax.Array

    def read(self) -> Latents:
        """As those of a cache are."""
        return self

    def take(self, at_BA: jax.Array) -> Latents:
        """Of each row those of these keys."""
        return Latents(*(entries.take(x, at_BA) for x in self))


class Cached(NamedTuple):
    """Latents where a cache has them, c and r one behind the other [B, S, `entries.width`(C + R)]; what is wanted of
    them is read before kernels and other devices see any."""

    kept: entries.Kept
    c_width: int
    r_width: int

    def read(self) -> Latents:
        return self._parts(entries.read(self.kept))

    def take(self, at_BA: jax.Array) -> Latents:
        return self._parts(entries.take(self.kept, at_BA))

    def _parts(self, both: jax.Array) -> Latents:
        c, r, _ = jnp.split(both, [self.c_width, self.c_width + self.r_width], axis=-1)
        return Latents(c, r)


class Index(NamedTuple):
    """The indexer's queries q [B, T, J, K], their weights w [B, T, J] float32, and its keys k [B, S, K]; or,
    with pools, one key a pool, [B, P, K]."""

    q: jax.Array
    w: jax.Array
    k: jax.Array
    pools: pools_lib.Pools | None = None


class Selection(NamedTuple):
    """The keys that queries may see: mask [B, T, S] bool; for one query a row, their numbers at [B, A] int32, of which
    only the visible ones count; or keys, what kernels find in place of a mask."""

    mask: jax.Array | Any = None
    at: jax.Array | Any = None
    keys: selected.Chosen | Any = None


class Looked(NamedTuple):
    """out [B, T, H, V]; selection: for layers that share it, None when every visible key is seen; loss [B, T]: of the
    indexer, 0 when it was not asked for."""

    out: jax.Array
    selection: Selection | None
    loss: jax.Array


# --- one pass ---------------------------------------------------------------------------------------------------------


@jax.named_scope("core")
def latent_attention(
    heads: Heads, latents: Latents | Cached, query: Span, key: Span, index: Index | None = None,
    selection: Selection | None = None, top_k: int = 0, with_loss: bool = False, block: int = 512,
) -> Looked:  # fmt: skip
    """Attention of T queries over S keys.

    Without `index` and `selection` every visible key is seen. With `index` and top_k > 0 each query sees the top_k
    visible keys of highest index score (ties: the earlier key), or those of so many pools, and the rest (see `pools`);
    with top_k = 0 all, and the index only learns. With `selection` those of an earlier layer. with_loss: the indexer's
    (`index_loss`), over the keys seen.
    Queries go in blocks of `block` when that divides them, which are computed anew for the gradient: the weights of all
    heads are [B, H, block, S] at a time. Where rows are split over devices, each gathers the latents of the row, and
    the indexer's keys, for its own queries.
    """
    B, T = heads.q.shape[:2]
    if T > 1:  # one query may want a few of them
        latents = latents.read()
    slots, branches = (None if x is None else jnp.broadcast_to(x, (B, T)) for x in query[1:3])
    query = Span(jnp.broadcast_to(query.segments, (B, T)), slots, branches, query.in_order)
    if index is None and selection is None and splash.supported(heads.q, heads.q, query, key):
        out_BTHV = splash.splash(*expand(heads, latents.read()), query, key)
        return Looked(out_BTHV, None, jnp.zeros((B, T), jnp.float32))
    kernels = T > 1 and supported(heads, latents, query, key, index, selection, with_loss)
    run = functools.partial(_kernels if kernels else _by_blocks, top_k=top_k, with_loss=with_loss)
    run = run if kernels else functools.partial(run, block=block)
    if T == 1 or context.parts() == 1 and not (kernels and rules.active() is not None):
        return run(heads, latents, query, key, index, selection)

    row: Any = context.spec("batch", "length")
    weights: Any = context.spec(None, "heads", None)
    by_head: Any = context.spec("batch", "length", "heads", None)

    def own(
        heads: Heads, latents: Latents | Cached, query: Span, key: Span, index: Index | None,
        selection: Selection | None,
    ) -> Looked:  # fmt: skip
        if context.parts() > 1:
            latents, key = jax.tree.map(context.gathered, (latents, key))
            index = None if index is None else index._replace(k=context.gathered(index.k))
        return run(heads, latents, query, key, index, selection, heads_over=by_head[2])

    where = Heads(by_head, by_head, weights, weights), row, row, row, row, row
    return context.per_device(own, where, Looked(by_head, row, row), kernel=True)(
        heads, latents, query, key, index, selection
    )


# --- on TPUs ----------------------------------------------------------------------------------------------------------


def supported(
    heads: Heads, latents: Any, query: Span, key: Span, index: Index | None, selection: Selection | None,
    with_loss: bool,
) -> bool:  # fmt: skip
    """Whether kernels take these: on a TPU, rows that see themselves in order, of `splash.SHORTEST` positions or more,
    in whole 128 on each device, and heads as wide as 128 or a multiple. A loss wants all heads on a device."""
    if rules.device().platform != "tpu" or query.in_order is None or key.in_order is None or query.slots is None:
        return False
    if query.branches is not None or (index is None and (selection is None or selection.keys is None)):
        return False
    if index is not None and index.pools is not None:  # keys of pools are chosen elsewhere
        return False
    B, T, H, N = heads.q.shape
    S = latents.c.shape[1]
    widths = [N + heads.r.shape[-1], heads.uv.shape[-1], *([] if index is None else [index.k.shape[-1]])]
    rows = parts = of_heads = 1
    if (mesh := rules.active_mesh()) is not None:
        entries = (rules.entry_axes(entry) for entry in context.spec("batch", "length", "heads"))
        rows, parts, of_heads = (math.prod(mesh.shape[axis] for axis in axes) for axes in entries)
    whole = T % (128 * parts * min(parts, 2)) == B % rows == H % of_heads == 0
    long_enough = T == S >= splash.SHORTEST and lightning.queries_at_once(S) > 0
    return whole and long_enough and all(n % 128 == 0 for n in widths) and not (with_loss and of_heads > 1)


def _kernels(
    heads: Heads, latents: Latents, query: Span, key: Span, index: Any, selection: Selection | None, top_k: int,
    with_loss: bool, heads_over: Any = None, interpret: bool = False,
) -> Looked:  # fmt: skip
    """As `_by_blocks`, of rows with an indexer or with what one has chosen."""
    B, T = heads.q.shape[:2]
    q_BHTK, k_BHSK, v_BHSV = (x.swapaxes(1, 2) for x in expand(heads, latents))
    q_BHTK *= q_BHTK.shape[-1] ** -0.5
    if selection is None:
        selection = Selection(keys=lightning.choose(index, query, key, top_k or k_BHSK.shape[2], interpret))
    out_BHTV, total_BHT = selected.attend(q_BHTK, k_BHSK, v_BHSV, selection.keys, query.slots, interpret)
    loss_BT = jnp.zeros((B, T), jnp.float32)
    if with_loss and index is not None:
        fixed = jax.lax.stop_gradient((q_BHTK, k_BHSK, total_BHT))
        loss_BT = lightning.loss(index, *fixed, selection.keys, query.slots, interpret)
    return Looked(out_BHTV.swapaxes(1, 2), selection if top_k else None, loss_BT)


def expand(heads: Heads, latents: Latents) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K], keys [B, S, H, K] and values [B, S, H, V] of every head, K = N + R."""
    q, r, uk_CHN, uv_CHV = heads
    k_BSHN = jnp.einsum("bsc,chn->bshn", latents.c, uk_CHN)
    r_BSHR = jnp.broadcast_to(latents.r[:, :, None], (*k_BSHN.shape[:3], r.shape[-1]))
    v_BSHV = jnp.einsum("bsc,chv->bshv", latents.c, uv_CHV)
    return jnp.concatenate([q, r], axis=-1), jnp.concatenate([k_BSHN, r_BSHR], axis=-1), v_BSHV


# --- elsewhere, by blocks of queries ----------------------------------------------------------------------------------


def _by_blocks(
    heads: Heads, latents: Latents | Cached, query: Span, key: Span, index: Any, selection: Selection | None,
    top_k: int, with_loss: bool, block: int, heads_over: Any = None,
) -> Looked:  # fmt: skip
    """Of queries [B, T, ...] and keys [B, S, ...]. heads_over: the axes that heads are split over, inside shard_map."""
    B, T = heads.q.shape[:2]
    keys = 0 if index is None else index.k.shape[1]
    sparse = 0 < top_k < keys
    look = functools.partial(_look, top_k=top_k if sparse else 0, with_loss=with_loss, heads_over=heads_over)
    few = sparse and keys > 2 * top_k if selection is None else selection.at is not None
    if T == 1 and few and not with_loss:
        return _one_query(heads, latents, query, key, index, selection, top_k)
    latents = latents.read()
    if T <= block or T % block:
        return look(heads, latents, query, key, index, selection)

    def blocks(x_BT: jax.Array | None) -> Any:
        return None if x_BT is None else jnp.moveaxis(x_BT.reshape(B, T // block, block, *x_BT.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(part: tuple) -> Looked:
        q, r, span, indexed, mask = part
        own_index = None if indexed is None else index._replace(q=indexed[0], w=indexed[1])
        own_selection = None if mask is None else Selection(mask)
        return look(heads._replace(q=q, r=r), latents, span, key, own_index, own_selection)

    indexed = None if index is None else (blocks(index.q), blocks(index.w))
    mask = None if selection is None else blocks(selection.mask)
    parts = jax.lax.map(one, (blocks(heads.q), blocks(heads.r), Span(*map(blocks, query[:3])), indexed, mask))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), parts)


def _look(
    heads: Heads, latents: Latents, query: Span, key: Span, index: Any, selection: Selection | None, top_k: int,
    with_loss: bool, heads_over: Any,
) -> Looked:  # fmt: skip
    seen_BTS = allowed_BTS = visible(query, key)
    scores_BTS: Any = None if index is None else index_scores(index)
    if selection is not None:
        allowed_BTS = seen_BTS & selection.mask
    elif top_k:
        allowed_BTS = _allowed(index, scores_BTS, seen_BTS, top_k)
        selection = Selection(allowed_BTS)
    form = absorbed if absorbing_pays(heads) else expanded
    out_BTHV, weights_BHTS = form(heads, latents, allowed_BTS)
    if not with_loss or index is None:
        return Looked(out_BTHV, selection, jnp.zeros(seen_BTS.shape[:2], jnp.float32))
    return Looked(out_BTHV, selection, index_loss(scores_BTS, weights_BHTS, allowed_BTS, heads_over))


def _allowed(index: Index, scores_BTS: jax.Array, seen_BTS: jax.Array, top_k: int) -> jax.Array:
    """Of the keys seen those that the index chooses; scores are of its own keys."""
    if index.pools is None:
        return select(scores_BTS, seen_BTS, top_k)
    whole_BTP = pools_lib.seen_whole(index.pools, seen_BTS)
    return pools_lib.open_keys(index.pools, select(scores_BTS, whole_BTP, top_k), whole_BTP, seen_BTS)


def _one_query(
    heads: Heads, latents: Latents | Cached, query: Span, key: Span, index: Any, selection: Selection | None, top_k: int
) -> Looked:
    """A row's one query over the latents of its chosen keys, which are gathered: the others are not read."""
    seen_BS = visible(query, key)[:, 0]
    if selection is None:
        selection = Selection(at=_chosen(index, seen_BS, top_k))
    at_BA = selection.at
    chosen = latents.take(at_BA)
    allowed_B1A = jnp.take_along_axis(seen_BS, at_BA, axis=1, mode="fill", fill_value=False)[:, None]
    return Looked(absorbed(heads, chosen, allowed_B1A)[0], selection, jnp.zeros((len(at_BA), 1), jnp.float32))


def _chosen(index: Index, seen_BS: jax.Array, top_k: int) -> jax.Array:
    """[B, A]: numbers of the keys that one query a row sees, which are in slots from the first on. Not all need be
    visible; those up to S are none."""
    scores_BX, pools, S = index_scores(index)[:, 0], index.pools, seen_BS.shape[1]
    if pools is None:
        return jax.lax.top_k(jnp.where(seen_BS, scores_BX, -jnp.inf), top_k)[1]
    whole_BP = pools_lib.seen_whole(pools, seen_BS[:, None])[:, 0]
    best_BA = jax.lax.top_k(jnp.where(whole_BP, scores_BX, -jnp.inf), top_k)[1]
    there_BA1 = jnp.take_along_axis(whole_BP, best_BA, axis=1)[..., None]
    at_BAn = jnp.where(there_BA1, pools_lib.members(pools, best_BA), S)
    rest_Bn = whole_BP.sum(-1, keepdims=True) * pools.size + jnp.arange(pools.size - 1)
    return jnp.concatenate([at_BAn.reshape(len(rest_Bn), -1), rest_Bn], axis=1)


# --- attention --------------------------------------------------------------------------------------------------------


def absorbing_pays(heads: Heads) -> bool:
    """Whether so few queries look that making keys and values costs more than wider products without them."""
    C, _, N = heads.uk.shape
    V = heads.uv.shape[-1]
    return heads.q.shape[1] * (2 * C - N - V) < C * (N + V)


def expanded(heads: Heads, latents: Latents, allowed_BTS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, H, V], weights [B, H, T, S] float32); keys and values of every head are made."""
    q, r, uk_CHN, uv_CHV = heads
    B, T, H, _ = q.shape
    S = latents.c.shape[1]
    k_BHNS = jnp.einsum("bsc,chn->bhns", latents.c, uk_CHN)
    r_BHRS = jnp.broadcast_to(latents.r.swapaxes(1, 2)[:, None], (B, H, r.shape[-1], S))
    q_BHTK = jnp.concatenate([q, r], axis=-1).transpose(0, 2, 1, 3)
    weights_BHTS, total_BHT1 = _weights(heads, q_BHTK, jnp.concatenate([k_BHNS, r_BHRS], axis=2), allowed_BTS)
    v_BHSV = jnp.einsum("bsc,chv->bhsv", latents.c, uv_CHV)
    out_BHTV = jnp.matmul(weights_BHTS.astype(v_BHSV.dtype), v_BHSV, preferred_element_type=jnp.float32) / total_BHT1
    return out_BHTV.astype(q.dtype).transpose(0, 2, 1, 3), weights_BHTS / total_BHT1


def absorbed(heads: Heads, latents: Latents, allowed_BTS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same; queries come to the latents instead."""
    q, r, uk_CHN, uv_CHV = heads
    B, T, H, _ = q.shape
    S, C = latents.c.shape[1:]
    q_BHTC = jnp.einsum("bthn,chn->bhtc", q, uk_CHN)
    q_B1MK = jnp.concatenate([q_BHTC, r.transpose(0, 2, 1, 3)], axis=-1).reshape(B, 1, H * T, -1)
    k_B1KS = jnp.concatenate([latents.c, latents.r], axis=-1).swapaxes(1, 2)[:, None]
    weights_BHTS, total_BHT1 = _weights(heads, q_B1MK, k_B1KS, allowed_BTS)
    mixed_BMC = jnp.matmul(
        weights_BHTS.astype(q.dtype).reshape(B, H * T, S), latents.c, preferred_element_type=jnp.float32
    )
    mixed_BHTC = (mixed_BMC.reshape(B, H, T, C) / total_BHT1).astype(q.dtype)
    return jnp.einsum("bhtc,chv->bthv", mixed_BHTC, uv_CHV), weights_BHTS / total_BHT1


def _weights(heads: Heads, q: jax.Array, k: jax.Array, allowed_BTS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(q k - the highest) [B, H, T, S] where allowed, and its sum over S: weights before they are divided."""
    B, T, H, N = heads.q.shape
    scale = (N + heads.r.shape[-1]) ** -0.5
    logits = jnp.matmul(q * scale, k, preferred_element_type=jnp.float32).reshape(B, H, T, -1)
    logits = logits + jnp.where(allowed_BTS, 0.0, MASKED)[:, None]
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    return weights, weights.sum(axis=-1, keepdims=True)


# --- the indexer ------------------------------------------------------------------------------------------------------


def index_scores(index: Index) -> jax.Array:
    """[B, T, S] float32: sum_j w_j relu(q_j k) / sqrt(J K)."""
    B, T, J, K = index.q.shape
    logits_BMS = jnp.matmul(index.q.reshape(B, T * J, K), index.k.swapaxes(1, 2), preferred_element_type=jnp.float32)
    return jnp.einsum("btjs,btj->bts", jax.nn.relu(logits_BMS).reshape(B, T, J, -1), index.w) * (J * K) ** -0.5


def select(scores_BTS: jax.Array, visible_BTS: jax.Array, top_k: int) -> jax.Array:
    """[B, T, S] bool: of the visible keys the top_k of highest score, of equal ones the earlier; all when fewer are."""
    if top_k >= scores_BTS.shape[-1]:
        return visible_BTS
    scores_BTS = jnp.where(visible_BTS, jax.lax.stop_gradient(scores_BTS), -jnp.inf)
    last_BT1 = kth_largest(scores_BTS, top_k)
    above_BTS = scores_BTS > last_BT1
    equal_BTS = scores_BTS == last_BT1
    room_BT1 = top_k - above_BTS.sum(-1, keepdims=True)
    return (above_BTS | (equal_BTS & (jnp.cumsum(equal_BTS, axis=-1) <= room_BT1))) & visible_BTS


def kth_largest(x_XS: jax.Array, k: int) -> jax.Array:
    """[..., 1]: the k-th largest number of each row of float32, exactly; no row may hold a NaN.

    Bit by bit from the highest: a bit is set if at least k numbers are as large as what then has been found. 32 passes
    that compare and count, where `lax.top_k` sorts whole rows on CPUs and, for a k like these, on TPUs. [4, 512, 512]
    numbers take 4 ms on two cores, and took 100.
    """
    bits_XS = jax.lax.bitcast_convert_type(x_XS, jnp.uint32)
    top = jnp.uint32(1 << 31)
    ordered_XS = jnp.where(bits_XS & top, ~bits_XS, bits_XS | top)  # as large as the numbers are

    def bit(i: jax.Array, found_X1: jax.Array) -> jax.Array:
        tried_X1 = found_X1 | (top >> i.astype(jnp.uint32))
        enough_X1 = (ordered_XS >= tried_X1).sum(-1, keepdims=True) >= k
        return jnp.where(enough_X1, tried_X1, found_X1)

    found_X1 = jax.lax.fori_loop(0, 32, bit, jnp.zeros((*x_XS.shape[:-1], 1), jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(found_X1 & top, found_X1 ^ top, ~found_X1), jnp.float32)


def index_loss(
    scores_BTS: jax.Array, weights_BHTS: jax.Array, allowed_BTS: jax.Array, heads_over: Any = None
) -> jax.Array:
    """[B, T]: KL(attention, mean over heads, without gradient || softmax of the index scores), over the allowed keys.

    DeepSeek-V3.2, equations 3 and 4: over all keys while the indexer warms up, over the selected ones after that.
    """
    target_BTS = jax.lax.stop_gradient(weights_BHTS.mean(axis=1))
    target_BTS = target_BTS if heads_over is None else jax.lax.pmean(target_BTS, heads_over)
    log_BTS = jax.nn.log_softmax(jnp.where(allowed_BTS, scores_BTS, MASKED), axis=-1)
    return jnp.where(allowed_BTS, jax.scipy.special.xlogy(target_BTS, target_BTS) - target_BTS * log_BTS, 0).sum(-1)
