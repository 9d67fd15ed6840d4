"""What the engine runs on devices: four programs over one cache of N rows that stays where it is (donated).

    encode    pictures to visual tokens, into a table of them          two a row length of patches: for few and many
    copy      rows of the cache over others                            one
    prefill   the next tokens of prompts into rows of the cache        two a chunk length: for one prompt and several
    decode    some tokens more of every running row                    one

A row of the cache holds the entries of a text's first tokens; its next token, which decoding reads, is known to the
host, as is everything else about a row: few numbers, which go with every call. So a prompt's last token is read by
decoding, and no program but that one has an output layer.

How rows lie on a mesh, `rows` knows: what concerns some is done to as many of each of its D data shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax.inference.rows import Rows
from glmv_jax.inference.sampler import Sampling, draw_index, likeliest, nucleus, without
from glmv_jax.models import abstract_params, logical_axes, vlm
from glmv_jax.models.glm5_next import GLM5NextConfig
from glmv_jax.models.rounding import rounded
from glmv_jax.parallel.mesh import data_shards
from glmv_jax.parallel.rules import SERVE, Rules, preset, use
from glmv_jax.typing import Params, TokenInput, VisionInput


class Chunk(NamedTuple):
    """The next C tokens of a text in each of L lanes a shard, and the one behind them, which an MTP head embeds.

    row:   [D, L] of those of the shard.   start: [D, L] the entry that the first token becomes.
    tokens: [D, L, C + 1]; positions: [D, L, C + 1, 3]; picture: [D, L, C + 1] the token's place in the table of visual
    tokens, or -1;  valid: [D, L, C] bool, padding comes last; a lane without work has nothing valid.
    """

    row: Any
    start: Any
    tokens: Any
    positions: Any
    picture: Any
    valid: Any


class Running(NamedTuple):
    """All rows, [N] each, before a call of decode.

    running: bool.       token: the next to be read; position: its rotary one; length: entries before it.
    drawn: tokens of the answer so far; limit: when it ends.
    key: [N, 2] uint32, of the seed; draw: see `requests.Request`.      temperature, top_p: float32.
    likely: bool, whether the likeliest tokens are to be told.
    """

    running: Any
    token: Any
    position: Any
    length: Any
    drawn: Any
    limit: Any
    key: Any
    draw: Any
    temperature: Any
    top_p: Any
    likely: Any


class Until(NamedTuple):
    """When a call of decode ends: after so many steps, or when no more rows run than these."""

    steps: Any
    running: Any


class Drawn(NamedTuple):
    """tokens, logprobs: [N, steps, J], of which those are there that are new (bool), in their order; likely: the K
    likeliest at each place and their log-probabilities [N, steps, J, K], zeros where no row asks for them; kept:
    [N, steps] drafts that were; running: [N] whether the answer goes on. J is 1 without drafts."""

    tokens: jax.Array
    logprobs: jax.Array
    likely: jax.Array
    likely_logprobs: jax.Array
    new: jax.Array
    kept: jax.Array
    running: jax.Array


class State(NamedTuple):
    """Between steps of decoding. i: steps so far; token: [N] the next to be read; count: [N] tokens drawn."""

    i: jax.Array
    token: jax.Array
    count: jax.Array  # type: ignore[assignment]  # in place of a tuple's own, which nobody asks
    cache: dict
    out: Drawn


# Of tokens: log-probabilities as `sampler.Generated` defines them [N, J], and the likeliest with theirs [N, J, K].
Told = tuple[jax.Array, jax.Array, jax.Array]


class Weights(NamedTuple):
    """The same parameters as prefill and as decode read them (`rounding.rounded`, `vlm.layers_apart`)."""

    prefill: Params
    decode: Params


class Programs:
    """The programs of one model, for `slots` rows of `length` entries. `traces` counts compilations."""

    width = 1  # tokens that a step reads of a row

    def __init__(
        self, cfg: vlm.VLMConfig, sampling: Sampling, slots: int, length: int, steps: int, pictures: int,
        mesh: Mesh | None, rules: Rules | None, placed: bool, likely: int,
    ) -> None:  # fmt: skip
        self.cfg, self.sampling, self.slots, self.length, self.steps = cfg, sampling, slots, length, steps
        self.likely = min(likely, cfg.decoder.vocab)
        self.pictures, self.mesh, self.rules = pictures, mesh, None if placed else rules or preset(SERVE)
        self.shards = data_shards(mesh)
        self.traces = 0
        self._rows = Rows(self._shapes(1), self._shapes(2), mesh, self.rules)
        self._copied = self._jit(lambda params: self._apart(jax.tree.map(jnp.copy, params)))
        self._borrowed = self._jit(self._apart)
        self._for_rows = self._jit(lambda params: vlm.for_rows(cfg, params, slots * self.width))
        self.empty = self._jit(self._empty)
        self.encode = self._jit(self._encode, donate=1)
        self.copy = self._jit(self._copy, donate=0)
        self.prefill = self._jit(self._prefill, donate=2)
        self.decode = self._jit(self._decode, donate=1)

    # --- parameters and memory ----------------------------------------------------------------------------------------

    def weights(self, params: Params, copy: bool) -> Weights:
        """The parameters laid out. copy: nothing of them is kept, so that their owner may go on to change (donate)
        his."""
        if self.mesh is not None and self.rules is not None:
            where = self.rules.shardings(self.mesh, logical_axes(self.cfg), params)
            params = jax.device_put(params, where)
        apart = self._copied(params) if copy else self._borrowed(params)
        return Weights(apart, self._for_rows(apart))

    def _apart(self, params: Params) -> Params:
        return vlm.layers_apart(self.cfg, rounded(self.cfg, params), vlm.init_cache(self.cfg, 1, 1), 0)[0]

    def _cache(self, params: Params, rows: int) -> dict:
        cache = vlm.layers_apart(self.cfg, params, vlm.init_cache(self.cfg, rows, self.length), rows)[1]
        return {"own": {name: x for name, x in cache.items() if name not in ("slots", "length")}}

    def _shapes(self, rows: int) -> dict:
        with self._in_force():
            return jax.eval_shape(lambda params: self._cache(params, rows), abstract_params(self.cfg))

    def _empty(self) -> tuple[dict, jax.Array | None]:
        """An empty cache, and an empty table of visual tokens (None for a model of text alone)."""
        cache = self._rows.pinned(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes(self.slots)))
        merger = self.cfg.merger
        return cache, None if merger is None else self._whole(jnp.zeros((self.pictures, merger.width), merger.dtype))

    # --- programs -----------------------------------------------------------------------------------------------------

    def _encode(self, params: Params, table_XD: jax.Array, vision: VisionInput, place_RM: jax.Array) -> jax.Array:
        """The table with the visual tokens of these rows of pictures; a place out of bounds is for padding."""
        visual_RMD = vlm.encode_images(self.cfg, params, vision)
        visual_XD = visual_RMD.reshape(-1, visual_RMD.shape[-1]).astype(table_XD.dtype)
        return self._whole(table_XD.at[place_RM.reshape(-1)].set(visual_XD, mode="drop"))

    def _copy(self, cache: dict, source_DP: jax.Array, target_DP: jax.Array, count: jax.Array) -> dict:
        """In each shard rows over others (or themselves), the first `count` of these pairs in their order."""

        def one(i: jax.Array, cache: dict) -> dict:
            at = lambda x_DP: jax.lax.dynamic_slice_in_dim(x_DP, i, 1, axis=1)  # noqa: E731
            return self._rows.put(cache, self._rows.take(cache, at(source_DP)), at(target_DP))

        return self._rows.pinned(jax.lax.fori_loop(0, count, one, cache))

    def _prefill(self, params: Params, table_XD: jax.Array | None, cache: dict, chunk: Chunk) -> dict:
        rows = self._rows.take(cache, chunk.row)
        if recurrent(self.cfg):  # a text that begins finds no state of another
            rows = self._rows.where(chunk.start.reshape(-1) > 0, rows, jax.tree.map(jnp.zeros_like, rows))
        visual = None if table_XD is None else jnp.broadcast_to(table_XD, (self.shards, *table_XD.shape))
        flat = Chunk(*(x.reshape(-1, *x.shape[2:]) for x in chunk))
        new = self._read(params, visual, rows, flat)
        D, L = chunk.row.shape
        if D * L == 1:
            return self._rows.pinned(self._rows.put(cache, new, chunk.row))
        works_DL = chunk.valid.any(axis=2)

        def one(lane: jax.Array, cache: dict) -> dict:
            """What a lane without work would write is what is there."""
            at = lambda x_DL: jax.lax.dynamic_slice_in_dim(x_DL, lane, 1, axis=1)  # noqa: E731
            made, there = self._rows.of_lane(new, lane, L), self._rows.take(cache, at(chunk.row))
            return self._rows.put(cache, self._rows.where(at(works_DL)[:, 0], made, there), at(chunk.row))

        # Not until all work is done: shards need not agree.
        return self._rows.pinned(jax.lax.fori_loop(0, L, one, cache))

    def _read(self, params: Params, visual: jax.Array | None, rows: dict, chunk: Chunk) -> dict:
        """Rows of a cache with a chunk's tokens in them."""
        return {"own": only(self._backbone(params, visual, rows, chunk).cache, rows["own"])}

    def _backbone(self, params: Params, visual: jax.Array | None, rows: dict, chunk: Chunk) -> vlm.VLMOutput:
        tokens = TokenInput(chunk.tokens[:, :-1], chunk.positions[:, :-1], chunk.valid.astype(jnp.int32),
                            chunk.picture[:, :-1])  # fmt: skip
        return vlm.apply(self.cfg, params, visual, tokens, rows["own"] | self._at(chunk.start))

    def _decode(self, params: Params, cache: dict, rows: Running, until: Until) -> tuple[dict, Drawn]:
        N, shape = self.slots, (self.slots, self.steps, self.width)
        keys_N = jax.vmap(_key)(rows.key, rows.draw)

        def step(s: State) -> State:
            cache, said_NJ, told, new_NJ, kept_N = self._advance(params, keys_N, rows, s)
            count_N, running_N = s.count + new_NJ.sum(axis=1), s.out.running
            ends_N = (self._is_stop(said_NJ) & new_NJ).any(axis=1) | (rows.drawn + count_N >= rows.limit)
            put = lambda old, new: old.at[:, s.i].set(new)  # noqa: E731
            columns: Any = map(put, s.out[:-1], (said_NJ, *told, new_NJ, kept_N))
            out = Drawn._make((*columns, running_N & ~ends_N))
            token_N = jnp.where(running_N, last_new(said_NJ, new_NJ)[:, 0], s.token)
            return State(s.i + 1, token_N, count_N, cache, out)

        several = (*shape, self.likely)
        none = Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(several, jnp.int32), jnp.zeros(several),
                     jnp.zeros(shape, bool), jnp.zeros(shape[:2], jnp.int32), rows.running)  # fmt: skip
        state = State(jnp.int32(0), rows.token, jnp.zeros(N, jnp.int32), cache, none)
        going = lambda s: (s.i < until.steps) & (s.out.running.sum() > until.running)  # noqa: E731
        state = jax.lax.while_loop(going, step, state)
        return self._rows.pinned(state.cache), jax.tree.map(self._whole, state.out)

    def _advance(
        self, params: Params, keys_N: jax.Array, rows: Running, s: State
    ) -> tuple[dict, jax.Array, Told, jax.Array, jax.Array]:
        """One step: the cache, and of J places a row the tokens said, what is told of them, and which are new; and how
        many drafts were kept."""
        out, logits_NJV = self._step(params, rows, s, s.token[:, None])
        probability_NV = probabilities(logits_NJV, rows, self.sampling)[:, 0]
        token_N1 = draw_index(jax.vmap(jax.random.fold_in)(keys_N, rows.drawn + s.count), probability_NV)[:, None]
        new_N1 = s.out.running[:, None]
        own = {"own": only(out.cache, s.cache["own"])}
        return own, token_N1, self._told(logits_NJV, token_N1, rows), new_N1, jnp.zeros(self.slots, jnp.int32)

    def _told(self, logits_NJV: jax.Array, token_NJ: jax.Array, rows: Running) -> Told:
        logprob_NJV = jax.nn.log_softmax(_scaled(logits_NJV, rows), axis=-1)

        def top(x_NJV: jax.Array) -> tuple[jax.Array, jax.Array]:
            logprob_NJK, likely_NJK = jax.lax.top_k(x_NJV, self.likely)
            return likely_NJK, logprob_NJK

        def none(x_NJV: jax.Array) -> tuple[jax.Array, jax.Array]:
            shape = (*x_NJV.shape[:2], self.likely)
            return jnp.zeros(shape, jnp.int32), jnp.zeros(shape)

        chosen_NJ = jnp.take_along_axis(logprob_NJV, token_NJ[..., None], axis=-1)[..., 0]
        if not self.likely:
            return chosen_NJ, *none(logprob_NJV)
        return chosen_NJ, *jax.lax.cond((rows.likely & rows.running).any(), top, none, logprob_NJV)

    def _step(self, params: Params, rows: Running, s: State, read_NJ: jax.Array) -> tuple[vlm.VLMOutput, jax.Array]:
        """The backbone reads these tokens of every row; what it made of them, and its logits."""
        N, J = read_NJ.shape
        running_NJ = jnp.broadcast_to(s.out.running[:, None], (N, J)).astype(jnp.int32)
        tokens = TokenInput(read_NJ, text_positions(rows.position + s.count, J), running_NJ, jnp.full((N, J), -1))
        out = vlm.apply(self.cfg, params, None, tokens, s.cache["own"] | self._at(rows.length + s.count))
        return out, vlm.logits(self.cfg, params, out.hidden)

    def _at(self, length_N: jax.Array) -> dict:
        """What a cache says beside its entries when rows have so many."""
        return {"slots": jnp.arange(self.length), "length": length_N}

    def _is_stop(self, tokens: jax.Array) -> jax.Array:
        return (tokens[..., None] == jnp.array(self.sampling.stop, jnp.int32)).any(-1)

    # --- placement ----------------------------------------------------------------------------------------------------

    def _whole(self, x: jax.Array) -> jax.Array:
        """On every device."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec()))

    def _in_force(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None or self.rules is None else use(self.mesh, self.rules)

    def _jit(self, function: Callable, donate: int | None = None) -> Callable:
        def traced(*args: Any) -> Any:
            self.traces += 1  # runs while tracing only
            with self._in_force():
                return function(*args)

        return jax.jit(traced, donate_argnums=() if donate is None else donate)


def recurrent(cfg: vlm.VLMConfig) -> bool:
    """Whether layers keep one state a row, which cannot go back to what it was some tokens ago."""
    return isinstance(cfg.decoder, GLM5NextConfig)


def probabilities(logits_NJV: jax.Array, rows: Running, sampling: Sampling) -> jax.Array:
    """`sampler.probabilities` where every row has a temperature and a top_p of its own; greedy: all of it on one."""
    top_p_N11, temperature_N11 = rows.top_p[:, None, None], rows.temperature[:, None, None]
    scaled_NJV = without(_scaled(logits_NJV, rows), sampling.suppress)
    cut = lambda x: jnp.where(top_p_N11 < 1, nucleus(x, top_p_N11), x)  # noqa: E731

    def drawn(x_NJV: jax.Array) -> jax.Array:
        return jax.nn.softmax(jax.lax.cond((rows.top_p < 1).any(), cut, lambda x: x, x_NJV), axis=-1)

    def greedy(x_NJV: jax.Array) -> jax.Array:
        return (likeliest(logits_NJV, sampling)[..., None] == jnp.arange(x_NJV.shape[-1])).astype(x_NJV.dtype)

    def both(x_NJV: jax.Array) -> jax.Array:
        return jnp.where(temperature_N11 == 0, greedy(x_NJV), drawn(x_NJV))

    # Most often rows are all of one kind.
    is_greedy_N = rows.temperature == 0
    kind = (is_greedy_N & rows.running).any().astype(jnp.int32) + (is_greedy_N | ~rows.running).all()
    return jax.lax.switch(kind, (drawn, both, greedy), scaled_NJV)


def _scaled(logits_NJV: jax.Array, rows: Running) -> jax.Array:
    temperature_N = jnp.where(rows.temperature == 0, 1.0, rows.temperature)
    return logits_NJV.astype(jnp.float32) / temperature_N[:, None, None]


def _key(words: jax.Array, draw: jax.Array) -> jax.Array:
    """The key of row `draw` of a sampler that was given jax.random.key(seed)."""
    return jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), draw)


def last_new(x_NJX: jax.Array, new_NJ: jax.Array) -> jax.Array:
    """[N, 1, ...]: of each row what belongs to the last that is new (they come first)."""
    at_N1 = jnp.maximum(new_NJ.sum(axis=1) - 1, 0)[:, None]
    return jnp.take_along_axis(x_NJX, at_N1.reshape(*at_N1.shape, *[1] * (x_NJX.ndim - 2)), axis=1)


def text_positions(first_N: jax.Array, count: int) -> jax.Array:
    """[N, count, 3]: of text from these on."""
    position_NJ = first_N[:, None] + jnp.arange(count)
    return jnp.broadcast_to(position_NJ[..., None], (*position_NJ.shape, 3))


def only(new: dict, old: dict) -> dict:
    """The entries of a cache, without what `_at` says."""
    return {name: new[name] for name in old}
