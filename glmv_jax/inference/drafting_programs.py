"""The engine's programs with drafts of the MTP head: a step reads a row's last token and K drafts behind it in one pass
of the backbone, keeps those that it would have drawn itself, and so yields 1 to K + 1 tokens: speculative decoding
(Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Greedy answers are those without drafts, token for
token; drawn ones have their distribution. Both caches are cut back to what was kept by their lengths alone, as later
entries overwrite the rest; the head's entries of kept drafts are written again, from the backbone's hidden states
instead of its own.

A row has, beside the backbone's entries, as many of the head's, and what its last one made: the first draft. Entry j of
the head embeds token j + 1, so a row that begins with another's first tokens reads the last of them once more.
What is drawn depends on the request alone here too: a step's random numbers are those of the place where it begins.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax.inference.programs import (
    Chunk,
    Programs,
    Running,
    State,
    Told,
    last_new,
    only,
    probabilities,
    text_positions,
)
from glmv_jax.inference.sampler import Sampling, draw_index
from glmv_jax.models import decoder, drafting, mtp, vlm
from glmv_jax.typing import Params, TokenInput, UserError


def check(cfg: vlm.VLMConfig, drafts: int) -> None:
    """UserError for a model that cannot draft here."""
    drafting.check(cfg)
    if drafts < 1:
        raise UserError(f"drafts={drafts}: a number of drafts; 0 for none")


class DraftingPrograms(Programs):
    """`Programs` with `drafts` drafts a step; `length` has to leave room for as many entries behind a row's last."""

    def __init__(
        self, cfg: vlm.VLMConfig, sampling: Sampling, slots: int, length: int, drafts: int, **more: Any
    ) -> None:
        check(cfg, drafts)
        self.drafts, self.width = drafts, drafts + 1
        super().__init__(cfg, sampling, slots, length, **more)

    def _cache(self, params: Params, rows: int) -> dict:
        own: mtp.MTPConfig | Any = self.cfg.mtp
        made = jnp.zeros((rows, 1, own.decoder.width), own.decoder.dtype)
        head = drafting.empty_cache(self.cfg, rows, self.length)
        return super()._cache(params, rows) | {"head": head, "draft": drafting.Draft(made, made)}

    def _read(self, params: Params, visual: jax.Array | None, rows: dict, chunk: Chunk) -> dict:
        out = self._backbone(params, visual, rows, chunk)
        behind = TokenInput(chunk.tokens[:, 1:], chunk.positions[:, 1:], None, chunk.picture[:, 1:])
        table_DCD = decoder.embed(params["decoder"], behind.tokens)
        given = mtp.HeadInput(table_DCD, vlm.embed(self.cfg, params, visual, behind), behind.image_row >= 0)
        head_cfg: mtp.MTPConfig | Any = self.cfg.mtp
        e_DCD, is_key_DC = mtp.OPTIONS[head_cfg.option](given)
        h_DCD, own = drafting.h_prev(self.cfg, out), rows["head"] | self._at(chunk.start)
        made, head = drafting.entries(self.cfg, params, e_DCD, h_DCD, behind.positions, own, is_key_DC)
        draft = _kept(made, chunk.valid, rows["draft"])
        return {"own": only(out.cache, rows["own"]), "head": only(head, rows["head"]), "draft": draft}

    def _advance(
        self, params: Params, keys_N: jax.Array, rows: Running, s: State
    ) -> tuple[dict, jax.Array, Told, jax.Array, jax.Array]:
        split = lambda key, n: jax.random.split(jax.random.fold_in(key, n), self.drafts + 2)  # noqa: E731
        keys_NJ = jax.vmap(split)(keys_N, rows.drawn + s.count)
        drafts_NK, q_NKV = self._propose(params, keys_NJ, rows, s)
        out, logits_NJV = self._step(params, rows, s, jnp.concatenate([s.token[:, None], drafts_NK], axis=1))
        p_NJV = probabilities(logits_NJV, rows, self.sampling)
        said_NJ, kept_N = keep(p_NJV, drafts_NK, q_NKV, keys_NJ[:, self.drafts :])
        new_NJ = self._new(rows, s, said_NJ, kept_N)
        # The head reads what was said beside the backbone's hidden states, over its entries of the drafts.
        made, head = self._head(params, rows, s, drafting.h_prev(self.cfg, out), said_NJ, 0, s.cache["head"])
        draft = _kept(made, new_NJ, s.cache["draft"])
        cache = {"own": only(out.cache, s.cache["own"]), "head": head, "draft": draft}
        return cache, said_NJ, self._told(logits_NJV, said_NJ, rows), new_NJ, kept_N

    def _propose(self, params: Params, keys_NJ: jax.Array, rows: Running, s: State) -> tuple[jax.Array, jax.Array]:
        """K drafts [N, K], and what each was drawn with [N, K, V]."""
        draft, head, tokens, drawn_with = s.cache["draft"], s.cache["head"], [], []
        for k in range(self.drafts):
            q_N1V = probabilities(vlm.logits(self.cfg, params, draft.hidden), rows, self.sampling)
            drawn_with.append(q_N1V)
            tokens.append(draw_index(keys_NJ[:, k], q_N1V[:, 0])[:, None])
            if k + 1 < self.drafts:
                draft, head = self._head(params, rows, s, draft.chain, tokens[-1], k, head)
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(drawn_with, axis=1)

    def _head(
        self, params: Params, rows: Running, s: State, h_NJD: jax.Array, tokens_NJ: jax.Array, k: int, head: dict
    ) -> tuple[drafting.Draft, dict]:
        """The head's entries from the k-th behind a row's last on, for these tokens."""
        first_N = rows.position + s.count + 1 + k
        made, new = drafting.step(
            self.cfg, params, h_NJD, tokens_NJ, text_positions(first_N, tokens_NJ.shape[1]),
            head | self._at(rows.length + s.count + k),
        )  # fmt: skip
        return made, only(new, head)

    def _new(self, rows: Running, s: State, said_NJ: jax.Array, kept_N: jax.Array) -> jax.Array:
        """[N, J] bool, what of all that was said counts: up to the first draft that was not kept, the first stop, and
        the answer's full length."""
        J = jnp.arange(self.width)
        is_stop_NJ = self._is_stop(said_NJ)
        after_stop_NJ = jnp.cumsum(is_stop_NJ, axis=1) > is_stop_NJ
        fits_NJ = (rows.drawn + s.count)[:, None] + J < rows.limit[:, None]
        return (J <= kept_N[:, None]) & ~after_stop_NJ & fits_NJ & s.out.running[:, None]


def _kept(made: drafting.Draft, new_NJ: jax.Array, before: drafting.Draft) -> drafting.Draft:
    """What the head made of the last that is new."""
    return jax.tree.map(lambda x, old: last_new(x, new_NJ).astype(old.dtype), made, before)


def keep(p_NJV: jax.Array, drafts_NK: jax.Array, q_NKV: jax.Array, keys_N2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the model, which draws with p, says at each place [N, J] and how many drafts, drawn with q, it keeps [N];
    J = K + 1.

    The first `kept` places hold the drafts, the next what is said in place of the first draft that was not kept, or
    after all of them; later ones mean nothing. A draft is kept with probability min(1, p / q), and otherwise a token is
    drawn from max(p - q, 0), so that either way it has p.
    """
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
