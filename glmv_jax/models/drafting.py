"""The MTP head as a draft model: its cache, and one step of it.

The head's entry j embeds token t_{j+1} beside h_j, the hidden state that has seen t_0..t_j, and says t_{j+2}; it lies
in slot j. A head that drafts several tokens is fed its own last hidden state in place of the backbone's, as at depth 2
and beyond of `mtp.apply`. There it attends to the entries of depth 1 before it, as serving engines do: there is one
cache, not one a depth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.kernels.span import Span
from glmv_jax.models import decoder, mtp, vlm
from glmv_jax.models.api import applied
from glmv_jax.models.block import BlockConfig
from glmv_jax.models.glm5_next import GLM5NextConfig
from glmv_jax.typing import Params, UserError


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
    head: mtp.MTPConfig | Any = cfg.mtp
    return out.hidden if head.h_prev == "post_norm" else out.prenorm


def empty_cache(cfg: vlm.VLMConfig, batch: int, length: int) -> dict:
    """Of `length` slots, without "slots" and "length". Where a head sees gaps, "keys" [B, S] is 1 for what it sees."""
    head: mtp.MTPConfig | Any = cfg.mtp
    own = jax.tree.map(lambda x: x[0], head.decoder.block.empty_cache(1, batch, length))
    return own | {"keys": jnp.zeros((batch, length), jnp.int32)} if head.option == "masked" else own


def step(
    cfg: vlm.VLMConfig, params: Params, h_BTD: jax.Array, tokens_BT: jax.Array, positions_BT3: jax.Array, cache: dict
) -> tuple[Draft, dict]:
    """The next T entries of each row, of text tokens beside h_BTD; the returned cache's length has grown by T."""
    return entries(cfg, params, decoder.embed(params["decoder"], tokens_BT), h_BTD, positions_BT3, cache)


def entries(
    cfg: vlm.VLMConfig, params: Params, e_BTD: jax.Array, h_BTD: jax.Array, positions_BT3: jax.Array, cache: dict,
    is_key_BT: jax.Array | None = None,
) -> tuple[Draft, dict]:  # fmt: skip
    """As `step`, of what `mtp.OPTIONS` embeds in place of text tokens; is_key_BT: which of them are seen, None: all."""
    B, T, _ = e_BTD.shape
    query, key = vlm.cached_spans(cache, T)
    if "keys" in cache:
        new_BT = jnp.ones((B, T), jnp.int32) if is_key_BT is None else is_key_BT.astype(jnp.int32)
        keys_BS = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(
            cache["keys"], new_BT, cache["length"], 0
        )
        cache, key = cache | {"keys": keys_BS}, key._replace(segments=keys_BS)
    own = {name: x for name, x in cache.items() if name not in ("length", "slots", "keys")}
    draft, own = _apply(cfg, params, e_BTD, h_BTD, positions_BT3, query, key, own)
    return draft, cache | own | {"length": cache["length"] + T}


def _apply(
    cfg: vlm.VLMConfig, params: Params, e_BTD: jax.Array, h_BTD: jax.Array, positions_BT3: jax.Array, query: Span,
    key: Span, cache: dict,
) -> tuple[Draft, dict]:  # fmt: skip
    head: mtp.MTPConfig | Any = cfg.mtp
    rope = head.decoder.rope(positions_BT3)
    weights = mtp.layer_params(head, params["mtp"], 1)
    layer = mtp.MTPLayer(head.decoder.block)
    pre_BTD, post_BTD, cache, _ = applied(layer, weights, e_BTD, h_BTD, rope, query, key, cache)
    return Draft(post_BTD if head.h_prev == "post_norm" else pre_BTD, post_BTD), cache
