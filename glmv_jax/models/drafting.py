"""The MTP head as a draft model: its cache, and one step of it.

The head's entry j embeds token t_{j+1} beside h_j, the hidden state that has seen t_0..t_j, and says t_{j+2}; it lies
in slot j. A head that drafts several tokens is fed its own last hidden state in place of the backbone's, as at depth 2
and beyond of `mtp.apply`. There it attends to the entries of depth 1 before it, as serving engines do: there is one
cache, not one a depth.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.kernels.attention import Span
from glmv_jax.models import decoder, mtp, vlm
from glmv_jax.models.block import BlockConfig
from glmv_jax.models.glm5_next import GLM5NextConfig
from glmv_jax.typing import Params, TokenInput, UserError


class Draft(NamedTuple):
    """chain: [B, T, D] what the head is fed next as h_prev; hidden: [B, T, D] for `vlm.logits`."""

    chain: jax.Array
    hidden: jax.Array


def check(cfg: vlm.VLMConfig) -> None:
    """Raises UserError for a model whose head cannot draft."""
    if cfg.mtp is None:
        raise UserError("this model has no MTP head to draft with; sample from it without drafts")
    if isinstance(cfg.decoder, GLM5NextConfig):
        raise UserError("linear attention keeps one state a row, which cannot go back to where a draft was wrong; "
                        "sample without drafts")
    if cfg.mtp.weights != "shared" and cfg.mtp.depth > 1:
        raise UserError("the MTP head has weights of its own for each depth; only a shared one drafts token by token")
    if cfg.mtp.option == "masked" and not isinstance(cfg.mtp.decoder.block, BlockConfig):
        raise UserError("mtp.option=masked leaves gaps in the head's cache, which latent attention does not skip; "
                        "sample without drafts")


def h_prev(cfg: vlm.VLMConfig, out: vlm.VLMOutput) -> jax.Array:
    """The backbone's hidden states [B, T, D] as the head takes them."""
    return out.hidden if cfg.mtp.h_prev == "post_norm" else out.prenorm


def prompt_cache(
    cfg: vlm.VLMConfig, params: Params, out: vlm.VLMOutput, tokens: TokenInput, group: int, length: int
) -> dict:
    """The head's cache after prompts, for `group` continuations of each and `length` more entries.

    out: the backbone's pass over `tokens`, right-padded rows of prompts of out.cache["length"] tokens. A prompt of n
    tokens leaves n - 1 entries: the next one needs the first token of an answer.
    """
    B, T = tokens.tokens.shape
    table_BTD = decoder.embed(params["decoder"], tokens.tokens)
    ahead = (jnp.roll(x, -1, axis=1) for x in mtp.HeadInput(table_BTD, out.merged, tokens.image_row >= 0))
    e_BTD, is_key_BT = mtp.OPTIONS[cfg.mtp.option](mtp.HeadInput(*ahead))
    slots_1T = jnp.arange(T)[None]
    span = Span(jnp.ones_like(slots_1T), slots_1T)
    positions = jnp.roll(tokens.positions, -1, axis=1)
    _, filled = _apply(cfg, params, e_BTD, h_prev(cfg, out), positions, span, span, _empty(cfg, B, T))
    valid_BT = is_key_BT & (jnp.arange(T) < out.cache["length"][:, None] - 1)
    own, slots, taken = cfg.mtp.decoder.block.continued(filled, valid_BT, group, length)
    return own | {"slots": jnp.arange(slots), "length": taken}


def step(
    cfg: vlm.VLMConfig, params: Params, h_BTD: jax.Array, tokens_BT: jax.Array, positions_BT3: jax.Array, cache: dict
) -> tuple[Draft, dict]:
    """The next T entries of each row, of text tokens beside h_BTD; the returned cache's length has grown by T."""
    return entries(cfg, params, decoder.embed(params["decoder"], tokens_BT), h_BTD, positions_BT3, cache)


def entries(
    cfg: vlm.VLMConfig, params: Params, e_BTD: jax.Array, h_BTD: jax.Array, positions_BT3: jax.Array, cache: dict
) -> tuple[Draft, dict]:
    """As `step`, of what `mtp.OPTIONS` embeds in place of text tokens."""
    T = e_BTD.shape[1]
    query, key = vlm.cached_spans(cache, T)
    own = {name: x for name, x in cache.items() if name not in ("length", "slots")}
    draft, own = _apply(cfg, params, e_BTD, h_BTD, positions_BT3, query, key, own)
    return draft, cache | own | {"length": cache["length"] + T}


def _apply(cfg: vlm.VLMConfig, params: Params, e_BTD, h_BTD, positions_BT3, query: Span, key: Span, cache: dict):
    rope = cfg.mtp.decoder.rope(positions_BT3)
    weights = {"params": mtp.layer_params(cfg.mtp, params["mtp"], 1)}
    layer = mtp.MTPLayer(cfg.mtp.decoder.block)
    pre_BTD, post_BTD, cache, _ = layer.apply(weights, e_BTD, h_BTD, rope, query, key, cache)
    return Draft(post_BTD if cfg.mtp.h_prev == "post_norm" else pre_BTD, post_BTD), cache


def _empty(cfg: vlm.VLMConfig, batch: int, length: int) -> dict:
    return jax.tree.map(lambda x: x[0], cfg.mtp.decoder.block.empty_cache(1, batch, length))
