"""Speculative decoding with the MTP head: it drafts K tokens, the backbone reads them all in one pass, and those that
it would have drawn itself are kept (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

Greedy answers are those of the plain sampler, token for token; drawn ones have its distribution. What changes is how
many tokens a pass of the backbone yields, 1 to K + 1. One program a shape, as in `sampler`: rows of a batch advance by
their own counts, and both caches are cut back to what was kept by their lengths alone, as later entries overwrite the
rest. The head's entries of kept drafts are then written again, from the backbone's hidden states instead of its own.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.inference.sampler import (
    Generated,
    Prompts,
    Sampling,
    choose,
    draw_index,
    inputs,
    last,
    likeliest,
    logprobs_of,
    prefill,
    probabilities,
)
from glmv_jax.models import drafting, vlm
from glmv_jax.typing import Params, TokenInput, UserError


class Counts(NamedTuple):
    """What the drafts of each row came to.

    passes:   [N] passes of the backbone over drafts (the prompt's is not one).
    reached:  [N, K] passes in which draft k was judged: all before it had been kept and the answer had not ended.
    accepted: [N, K] passes in which it was kept.
    """

    passes: jax.Array
    reached: jax.Array
    accepted: jax.Array


class Speculated(NamedTuple):
    answers: Generated
    counts: Counts


class SpeculativeSampler:
    """`Sampler` with drafts: one model configuration, one way of drawing, K drafts a pass. `traces` as there.

    Raises UserError for a model without an MTP head, or whose head keeps no cache, and for less than one draft.
    """

    def __init__(self, cfg: vlm.VLMConfig, sampling: Sampling, drafts: int, group: int = 1):
        drafting.check(cfg)
        if drafts < 1:
            raise UserError(f"drafts={drafts}: a pass verifies at least one draft; for none use Sampler")
        if group < 1:
            raise ValueError(f"group={group} must be at least 1")
        self.cfg, self.sampling, self.drafts, self.group = cfg, sampling, drafts, group
        self.traces = 0
        self._run = jax.jit(self._trace)

    def __call__(self, params: Params, prompts: Prompts, key: jax.Array) -> Speculated:
        """`group` answers to each of B prompts, as `Sampler` returns them, and what their drafts came to."""
        return self._run(params, prompts, key)

    def _trace(self, params: Params, prompts: Prompts, key: jax.Array) -> Speculated:
        self.traces += 1  # runs while tracing only
        return speculate(self.cfg, self.sampling, self.drafts, self.group, params, prompts, key)


def speculate(
    cfg: vlm.VLMConfig, sampling: Sampling, drafts: int, group: int, params: Params, prompts: Prompts, key: jax.Array
) -> Speculated:
    """The program of `SpeculativeSampler`, unjitted."""
    passes, state = begin(cfg, sampling, drafts, group, params, prompts, key)
    state = jax.lax.while_loop(lambda s: passes.going(s).any(), passes.step, state)
    return Speculated(state.out, state.counts)


class State(NamedTuple):
    """What a pass changes.

    t:      [] passes so far.
    token:  [N] the last of each answer.
    draft:  [N, 1, D] what the head made of it.
    cache, head: entries of the answers, of the backbone and of the MTP head.

    Between passes an answer of n tokens has n - 1 entries in the backbone's cache, whose last token is still to be
    read, and n in the head's, the last of which has given `draft`: the hidden state that says the next token.
    """

    t: jax.Array
    token: jax.Array
    draft: drafting.Draft
    cache: dict
    head: dict
    out: Generated
    counts: Counts


def begin(
    cfg: vlm.VLMConfig, sampling: Sampling, drafts: int, group: int, params: Params, prompts: Prompts, key: jax.Array
) -> tuple[Passes, State]:
    """The prompts are read, and each answer has its first token, as the plain sampler draws it, and the head's entry
    for it."""
    repeat = lambda x: jnp.repeat(x, group, axis=0)  # noqa: E731
    out = prefill(cfg, params, prompts)
    N = len(prompts.length) * group
    keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(N))

    # A row writes at most K slots beyond its last token, in the head's cache one more.
    slots = sampling.max_new_tokens + drafts + 1
    head = drafting.prompt_cache(cfg, params, out, inputs(prompts), group, slots)
    cache = vlm.share_prompts(cfg, out.cache, group, slots)
    logits_NV = repeat(vlm.logits(cfg, params, last(out.hidden, prompts))[:, 0])
    h_N1D = repeat(last(drafting.h_prev(cfg, out), prompts))
    params, cache = vlm.layers_apart(cfg, params, cache, N * (drafts + 1))
    # What is only read need not travel through the loop; lengths count from where the prompts' own entries end.
    fixed = lambda tree: {name: tree.pop(name) for name in ("prompt", "slots", "length") if name in tree}  # noqa: E731
    passes = Passes(cfg, sampling, drafts, params, keys_N, repeat(prompts.next_position), fixed(cache), fixed(head))

    token_N, logprob_N = choose(logits_NV, jax.vmap(jax.random.fold_in, (0, None))(keys_N, 0), sampling)
    answers = _first(token_N, logprob_N, repeat(prompts.length) > 0, sampling)
    none_N = jnp.zeros(N, jnp.int32)
    draft, own = passes.draft(h_N1D, token_N[:, None], none_N, head)
    counts = Counts(none_N, jnp.zeros((N, drafts), jnp.int32), jnp.zeros((N, drafts), jnp.int32))
    return passes, State(jnp.int32(1), token_N, draft, cache, _of(own, head), answers, counts)


def _first(token_N: jax.Array, logprob_N: jax.Array, there_N: jax.Array, sampling: Sampling) -> Generated:
    """Answers of one token, of the rows that are there."""
    N, Tn = len(token_N), sampling.max_new_tokens
    return Generated(
        jnp.full((N, Tn), sampling.pad, jnp.int32).at[:, 0].set(jnp.where(there_N, token_N, sampling.pad)),
        jnp.zeros((N, Tn)).at[:, 0].set(jnp.where(there_N, logprob_N, 0.0)),
        there_N.astype(jnp.int32),
        _is_stop(token_N, sampling) & there_N,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """What all passes share, and one pass (`step`).

    params: with layers apart.       keys_N: a random key a row.       start_N: position of an answer's first token.
    cache, head: of both caches, what is only read, and "length", at which an answer's own entries begin.
    """

    cfg: vlm.VLMConfig
    sampling: Sampling
    drafts: int
    params: Params
    keys_N: jax.Array
    start_N: jax.Array
    cache: dict
    head: dict

    def going(self, s: State) -> jax.Array:
        """[N] rows whose answer is not over; `lengths` of rows that only fill the batch is 0."""
        return ~s.out.finished & (s.out.lengths < self.sampling.max_new_tokens) & (s.out.lengths > 0)

    def step(self, s: State) -> State:
        """One pass: draft, read the last token and the drafts at once, add what was said to the answers, and let the
        head read it."""
        K, n_N = self.drafts, s.out.lengths
        keys_NJ = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, s.t), K + 2))(self.keys_N)
        drafts_NK, q_NKV = self.propose(s, keys_NJ)
        out, logits_NJV = self.read(s, drafts_NK)
        said_NJ, kept_N = judge(logits_NJV, drafts_NK, q_NKV, keys_NJ[:, K:], self.sampling)

        new_NJ = self.new(s, said_NJ, kept_N)
        answers = self.extended(s.out, said_NJ, logprobs_of(logits_NJV, said_NJ, self.sampling), new_NJ)
        newest_N1 = jnp.maximum(new_NJ.sum(axis=1) - 1, 0)[:, None]
        token_N = jnp.where(self.going(s), jnp.take_along_axis(said_NJ, newest_N1, axis=1)[:, 0], s.token)
        counts = Counts(
            s.counts.passes + self.going(s),
            s.counts.reached + new_NJ[:, :K],
            s.counts.accepted + (new_NJ[:, :K] & (jnp.arange(K) < kept_N[:, None])),
        )

        # The head reads what was said beside the backbone's hidden states, over its entries of the drafts.
        entries, own = self.draft(drafting.h_prev(self.cfg, out), said_NJ, n_N, s.head)
        draft = jax.tree.map(lambda x: jnp.take_along_axis(x, newest_N1[..., None], axis=1), entries)
        return State(s.t + 1, token_N, draft, _of(out.cache, s.cache), _of(own, s.head), answers, counts)

    def propose(self, s: State, keys_NK: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """K drafts [N, K], and what each was drawn with [N, K, V] (greedy ones: None)."""
        draft, own = s.draft, s.head
        tokens, drawn_with = [], []
        for k in range(self.drafts):
            logits_NV = vlm.logits(self.cfg, self.params, draft.hidden)[:, 0]
            if self.sampling.temperature == 0:
                tokens.append(likeliest(logits_NV, self.sampling))
            else:
                drawn_with.append(probabilities(logits_NV, self.sampling))
                tokens.append(draw_index(keys_NK[:, k], drawn_with[-1]))
            if k + 1 < self.drafts:
                draft, own = self.draft(draft.chain, tokens[-1][:, None], s.out.lengths + k, own)
        return jnp.stack(tokens, 1), jnp.stack(drawn_with, 1) if drawn_with else None

    def read(self, s: State, drafts_NK: jax.Array) -> tuple[vlm.VLMOutput, jax.Array]:
        """The backbone reads the last token and the drafts; what it made of them, and its logits [N, J, V]."""
        before_N = s.out.lengths - 1
        read_NJ = jnp.concatenate([s.token[:, None], drafts_NK], axis=1)
        ones_NJ = jnp.ones_like(read_NJ)
        tokens = TokenInput(read_NJ, self.at(before_N, read_NJ.shape[1]), ones_NJ, -ones_NJ)
        length_N = self.cache["length"] + jnp.maximum(before_N, 0)
        out = vlm.apply(self.cfg, self.params, None, tokens, s.cache | self.cache | {"length": length_N})
        return out, vlm.logits(self.cfg, self.params, out.hidden)

    def new(self, s: State, said_NJ: jax.Array, kept_N: jax.Array) -> jax.Array:
        """[N, J] bool, what of all that was said counts: up to the first draft that was not kept, the first stop, and
        the answer's full length."""
        J = jnp.arange(said_NJ.shape[1])
        is_stop_NJ = _is_stop(said_NJ, self.sampling)
        after_stop_NJ = jnp.cumsum(is_stop_NJ, axis=1) > is_stop_NJ
        fits_NJ = s.out.lengths[:, None] + J < self.sampling.max_new_tokens
        return (J <= kept_N[:, None]) & ~after_stop_NJ & fits_NJ & self.going(s)[:, None]

    def extended(self, out: Generated, said_NJ: jax.Array, logprob_NJ: jax.Array, new_NJ: jax.Array) -> Generated:
        """The answers with what is new."""
        rows_N1 = jnp.arange(len(new_NJ))[:, None]
        places_NJ = out.lengths[:, None] + jnp.arange(new_NJ.shape[1])
        places_NJ = jnp.where(new_NJ, places_NJ, self.sampling.max_new_tokens)  # which is out of bounds
        put = lambda old, new: old.at[rows_N1, places_NJ].set(new, mode="drop")  # noqa: E731
        return Generated(
            put(out.tokens, said_NJ),
            put(out.logprobs, logprob_NJ),
            out.lengths + new_NJ.sum(axis=1),
            out.finished | (_is_stop(said_NJ, self.sampling) & new_NJ).any(axis=1),
        )

    def draft(self, h_NJD: jax.Array, tokens_NJ: jax.Array, first_N: jax.Array, own: dict
              ) -> tuple[drafting.Draft, dict]:
        """The head's entries first, first + 1, ... of each answer, for these tokens, and its cache with them."""
        own = own | self.head | {"length": self.head["length"] + first_N}
        return drafting.step(self.cfg, self.params, h_NJD, tokens_NJ, self.at(first_N, tokens_NJ.shape[1]), own)

    def at(self, first_N: jax.Array, length: int) -> jax.Array:
        """Positions [N, length, 3] of answer tokens first, first + 1, ..."""
        position_NJ = (self.start_N + first_N)[:, None] + jnp.arange(length)
        return jnp.broadcast_to(position_NJ[..., None], (*position_NJ.shape, 3))


def _is_stop(tokens: jax.Array, sampling: Sampling) -> jax.Array:
    return (tokens[..., None] == jnp.array(sampling.stop, jnp.int32)).any(-1)


def _of(new: dict, old: dict) -> dict:
    """What the loop carries of a cache."""
    return {name: new[name] for name in old}


def judge(
    logits_NJV: jax.Array, drafts_NK: jax.Array, q_NKV: jax.Array | None, keys_N2: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """What the model says at each place [N, J] and how many drafts it keeps [N], J = K + 1.

    The first `kept` places hold the drafts, the next what is said in place of the first draft that was not kept, or
    after all of them; later ones mean nothing. Greedy: a draft is kept if it is the likeliest token. Drawn from q: with
    probability min(1, p / q), and otherwise a token is drawn from max(p - q, 0), so that either way it has p.
    """
    if sampling.temperature == 0:
        said_NJ = likeliest(logits_NJV, sampling)
        return said_NJ, jnp.cumprod(said_NJ[:, :-1] == drafts_NK, axis=1).sum(axis=1)
    return keep(probabilities(logits_NJV, sampling), drafts_NK, q_NKV, keys_N2)


def keep(
    p_NJV: jax.Array, drafts_NK: jax.Array, q_NKV: jax.Array, keys_N2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`judge` of drafts that were drawn with q, where the model draws with p."""
    K = drafts_NK.shape[1]
    of_draft = lambda x_NKV: jnp.take_along_axis(x_NKV, drafts_NK[..., None], axis=2)[..., 0]  # noqa: E731
    uniform_NK = jax.vmap(lambda key: jax.random.uniform(key, (K,)))(keys_N2[:, 0])
    keep_NK = uniform_NK * of_draft(q_NKV) < of_draft(p_NJV[:, :K])
    kept_N = jnp.cumprod(keep_NK, axis=1).sum(axis=1)
    there = lambda x_NV, at_N: jnp.take_along_axis(x_NV, at_N[:, None, None], axis=1)[:, 0]  # noqa: E731
    p_NV, q_NV = there(p_NJV, kept_N), there(q_NKV, jnp.minimum(kept_N, K - 1))
    rest_NV = jnp.where(kept_N[:, None] < K, jnp.maximum(p_NV - q_NV, 0.0), p_NV)
    # Where p and q are the same but for rounding, nothing may be left.
    rest_NV = jnp.where(rest_NV.sum(axis=-1, keepdims=True) > 0, rest_NV, p_NV)
    final_N = draw_index(keys_N2[:, 1], rest_NV)
    padded_NJ = jnp.pad(drafts_NK, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(K + 1) < kept_N[:, None], padded_NJ, final_N[:, None]), kept_N
