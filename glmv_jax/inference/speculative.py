"""Speculative decoding with the MTP head: it drafts K tokens, the backbone reads them all in one pass, and those that
it would have drawn itself are kept (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

Greedy answers are those of the plain sampler, token for token; drawn ones have its distribution. What changes is how
many tokens a pass of the backbone yields, 1 to K + 1. One program a shape, as in `sampler`: rows of a batch advance by
their own counts, and both caches are cut back to what was kept by their lengths alone, as later entries overwrite the
rest. The head's entries of kept drafts are then written again, from the backbone's hidden states instead of its own.
"""

from __future__ import annotations

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
    """The program of `SpeculativeSampler`, unjitted.

    Between passes an answer of n tokens has n - 1 entries in the backbone's cache, whose last token is still to be
    read, and n in the head's, the last of which has given `draft`: the hidden state that says the next token.
    """
    K, Tn = drafts, sampling.max_new_tokens
    repeat = lambda x: jnp.repeat(x, group, axis=0)  # noqa: E731
    out = prefill(cfg, params, prompts)
    start_N = repeat(prompts.next_position)
    N = start_N.shape[0]
    keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(N))

    # A row writes at most K slots beyond its last token, in the head's cache one more.
    slots = Tn + K + 1
    head = drafting.prompt_cache(cfg, params, out, inputs(prompts), group, slots)
    cache = vlm.share_prompts(cfg, out.cache, group, slots)
    logits_NV = repeat(vlm.logits(cfg, params, last(out.hidden, prompts))[:, 0])
    h_N1D = repeat(last(drafting.h_prev(cfg, out), prompts))
    params, cache = vlm.layers_apart(cfg, params, cache, N * (K + 1))
    # What is only read need not travel through the loop; lengths count from where the prompts' own entries end.
    apart = lambda tree: {name: tree.pop(name) for name in ("prompt", "slots") if name in tree}  # noqa: E731
    fixed, head_fixed, begin, head_begin = apart(cache), apart(head), cache.pop("length"), head.pop("length")

    class State(NamedTuple):
        t: jax.Array  # passes so far
        token: jax.Array  # [N] the last of each answer
        draft: drafting.Draft  # [N, 1, D]
        cache: dict
        head: dict
        out: Generated
        counts: Counts

    def going(s: State) -> jax.Array:
        """[N] rows whose answer is not over; `lengths` of rows that only fill the batch is 0."""
        return ~s.out.finished & (s.out.lengths < Tn) & (s.out.lengths > 0)

    def at(first_N: jax.Array, length: int) -> jax.Array:
        """Positions [N, length, 3] of answer tokens first, first + 1, ..."""
        return jnp.broadcast_to(((start_N + first_N)[:, None] + jnp.arange(length))[..., None], (N, length, 3))

    def propose(s: State, keys_NK) -> tuple[jax.Array, jax.Array | None]:
        """K drafts [N, K], and what each was drawn with [N, K, V] (greedy ones: None)."""
        draft, own = s.draft, s.head | head_fixed | {"length": head_begin + s.out.lengths}
        tokens, drawn_with = [], []
        for k in range(K):
            logits_NV = vlm.logits(cfg, params, draft.hidden)[:, 0]
            if sampling.temperature == 0:
                tokens.append(likeliest(logits_NV, sampling))
            else:
                drawn_with.append(probabilities(logits_NV, sampling))
                tokens.append(draw_index(keys_NK[:, k], drawn_with[-1]))
            if k + 1 < K:
                positions = at(s.out.lengths + k, 1)
                draft, own = drafting.step(cfg, params, draft.chain, tokens[-1][:, None], positions, own)
        return jnp.stack(tokens, 1), jnp.stack(drawn_with, 1) if drawn_with else None

    def step(s: State) -> State:
        n_N, going_N = s.out.lengths, going(s)
        keys_NJ = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, s.t), K + 2))(keys_N)

        # ---- draft, and read the last token and the drafts in one pass
        drafts_NK, q_NKV = propose(s, keys_NJ)
        read_NJ = jnp.concatenate([s.token[:, None], drafts_NK], axis=1)
        ones_NJ = jnp.ones_like(read_NJ)
        tokens = TokenInput(read_NJ, at(n_N - 1, K + 1), ones_NJ, -ones_NJ)
        out = vlm.apply(cfg, params, None, tokens, s.cache | fixed | {"length": begin + jnp.maximum(n_N - 1, 0)})
        logits_NJV = vlm.logits(cfg, params, out.hidden)
        said_NJ, kept_N = judge(logits_NJV, drafts_NK, q_NKV, keys_NJ[:, K:], sampling)

        # ---- of what was said: up to the first draft that was not kept, the first stop, and the answer's full length
        J = jnp.arange(K + 1)
        is_stop_NJ = (said_NJ[..., None] == jnp.array(sampling.stop, jnp.int32)).any(-1)
        after_stop_NJ = jnp.cumsum(is_stop_NJ, axis=1) > is_stop_NJ
        new_NJ = (J <= kept_N[:, None]) & ~after_stop_NJ & (n_N[:, None] + J < Tn) & going_N[:, None]
        new_N = new_NJ.sum(axis=1)
        rows_N1, places_NJ = jnp.arange(N)[:, None], jnp.where(new_NJ, n_N[:, None] + J, Tn)
        put = lambda old, new: old.at[rows_N1, places_NJ].set(new, mode="drop")  # noqa: E731
        answers = Generated(
            put(s.out.tokens, said_NJ),
            put(s.out.logprobs, logprobs_of(logits_NJV, said_NJ, sampling)),
            n_N + new_N,
            s.out.finished | (is_stop_NJ & new_NJ).any(axis=1),
        )
        newest_N1 = jnp.maximum(new_N - 1, 0)[:, None]
        token_N = jnp.where(going_N, jnp.take_along_axis(said_NJ, newest_N1, axis=1)[:, 0], s.token)
        counts = Counts(
            s.counts.passes + going_N,
            s.counts.reached + new_NJ[:, :K],
            s.counts.accepted + (new_NJ[:, :K] & (J[:K] < kept_N[:, None])),
        )

        # ---- the head reads what was said beside the backbone's hidden states, over its entries of the drafts
        own = s.head | head_fixed | {"length": head_begin + n_N}
        entries, own = drafting.step(cfg, params, drafting.h_prev(cfg, out), said_NJ, at(n_N, K + 1), own)
        draft = jax.tree.map(lambda x: jnp.take_along_axis(x, newest_N1[..., None], axis=1), entries)
        keep = lambda new, old: {name: new[name] for name in old}  # noqa: E731
        return State(s.t + 1, token_N, draft, keep(out.cache, s.cache), keep(own, s.head), answers, counts)

    # ---- the first token, as the plain sampler draws it, and the head's entry for it
    token_N, logprob_N = choose(logits_NV, jax.vmap(jax.random.fold_in, (0, None))(keys_N, 0), sampling)
    there_N = repeat(prompts.length) > 0
    blank = jnp.full((N, Tn), sampling.pad, jnp.int32), jnp.zeros((N, Tn))
    begun = Generated(
        blank[0].at[:, 0].set(jnp.where(there_N, token_N, sampling.pad)),
        blank[1].at[:, 0].set(jnp.where(there_N, logprob_N, 0.0)),
        there_N.astype(jnp.int32),
        (token_N[:, None] == jnp.array(sampling.stop, jnp.int32)).any(-1) & there_N,
    )
    none_N = jnp.zeros(N, jnp.int32)
    own = head | head_fixed | {"length": head_begin + none_N}
    draft, own = drafting.step(cfg, params, h_N1D, token_N[:, None], at(none_N, 1), own)
    counts = Counts(none_N, jnp.zeros((N, K), jnp.int32), jnp.zeros((N, K), jnp.int32))
    state = State(jnp.int32(1), token_N, draft, cache, {name: own[name] for name in head}, begun, counts)
    state = jax.lax.while_loop(lambda s: going(s).any(), step, state)
    return Speculated(state.out, state.counts)


def judge(
    logits_NJV: jax.Array, drafts_NK: jax.Array, q_NKV: jax.Array | None, keys_N2: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """What the model says at each place [N, J] and how many drafts it keeps [N], J = K + 1.

    The first `kept` places hold the drafts, the next what is said in place of the first draft that was not kept, or
    after all of them; later ones mean nothing. Greedy: a draft is kept if it is the likeliest token. Drawn from q: with
    probability min(1, p / q), and otherwise a token is drawn from max(p - q, 0), so that either way it has p.
    """
    K = drafts_NK.shape[1]
    if sampling.temperature == 0:
        said_NJ = likeliest(logits_NJV, sampling)
        return said_NJ, jnp.cumprod(said_NJ[:, :K] == drafts_NK, axis=1).sum(axis=1)
    p_NJV = probabilities(logits_NJV, sampling)
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
