"""Multimodal multi-token prediction (GLM-5V-Turbo, section 2.2): one extra layer, applied K times.

    x = eh_proj([enorm(e), hnorm(h_prev)]) ;  h = block(x) ;  logits = head(norm(h))

Depth k = 1..K at position i: e is the embedding of t_{i+k}, h_prev the hidden state of depth k - 1 (depth 0 is the
backbone's), the rotary position is the (time, height, width) triple of t_{i+k}, and the target is t_{i+k+1}. The
embedding table and the output head are the backbone's. Layer and weight names follow the released checkpoints.
The K depths have one set of weights (GLM-5; checkpoints hold one layer) or one each (DeepSeek-V3), then stacked on a
leading axis.

What the head sees where t_{i+k} is an image placeholder is the ablation, functions of one signature:
`embeddings` the visual embedding that entered the backbone, `embeddings_stopped` the same without a gradient to the
encoder, `masked` nothing (the position is no key either), `image_token` one shared learnable vector: the placeholder's
own row of the table, which the backbone never reads (visual tokens overwrite it), so its only gradient is this head's.
The paper adopts the last.
The paper does not say whether h_prev is taken before or after the final norm, nor which positions it feeds: `h_prev` is
a field, and the position triple of the token embedded is our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.models.api import applied
from glmv_jax.models.layers import Linear, RMSNorm
from glmv_jax.parallel import context
from glmv_jax.parallel.remat import policy
from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """depth K of prediction; option: which of OPTIONS; h_prev: "post_norm" or "pre_norm" (see the file's head);
    weights: "shared" by all depths, or "per_depth"."""

    decoder: Any  # DecoderConfig, or another of its kind
    depth: int = 1
    option: str = "image_token"
    h_prev: str = "post_norm"
    weights: str = "shared"

    def __post_init__(self) -> None:
        if self.option not in OPTIONS:
            raise UserError(f"mtp.option={self.option!r} is not known; choose one of {', '.join(OPTIONS)}")
        if self.h_prev not in ("post_norm", "pre_norm"):
            raise UserError(f"mtp.h_prev={self.h_prev!r} is not known; choose post_norm or pre_norm")
        if self.weights not in ("shared", "per_depth"):
            raise UserError(f"mtp.weights={self.weights!r} is not known; choose shared or per_depth")
        if self.depth < 1:
            raise UserError(f"mtp.depth={self.depth}: the first prediction head has depth 1")

    def flops(self, tokens: float, keys: float) -> float:
        d = self.decoder
        return self.depth * tokens * (d.block.flops(keys) + 4 * d.width**2 + 2 * d.width * d.vocab)

    def module(self) -> nn.Module:
        """What has the parameters: one layer, or K with theirs on a leading axis (to initialise; `apply` takes them one
        by one)."""
        if self.weights == "shared":
            return MTPLayer(self.decoder.block)
        stacked = nn.vmap(
            MTPLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stacked(self.decoder.block)

    def example(self) -> tuple:
        x = jnp.zeros((1, 2, self.decoder.width))
        span = Span(jnp.ones((1, 2), jnp.int32), jnp.arange(2)[None])
        return x, x, self.decoder.rope(jnp.zeros((1, 2, 3), jnp.int32)), span, span


class MTPLayer(nn.Module):
    cfg: Any  # of the block

    @nn.compact
    def __call__(
        self, e_BTD: jax.Array, h_BTD: jax.Array, rope: Any, query: Span, key: Span, cache: Any = None
    ) -> tuple[jax.Array, jax.Array, Any, dict[str, jax.Array]]:
        """(h, norm(h), cache, aux): what the next depth is fed before and after the norm, the block's cache with these
        positions in it (None without one), and what the block says."""
        c = self.cfg
        norm = lambda name: RMSNorm("norm", c.norm_eps, name=name)  # noqa: E731
        x = jnp.concatenate([norm("enorm")(e_BTD), norm("hnorm")(h_BTD)], axis=-1).astype(c.dtype)
        x = Linear(c.width, ("merge", "projection"), False, c.dtype, name="eh_proj")(x)
        x, (cache, aux) = c.layer(c, name="block")(x, cache, rope, query, key)
        return x, norm("norm")(x), cache, aux


class HeadInput(NamedTuple):
    """What an option chooses from, all of the token embedded: [B, T, D], [B, T, D], [B, T]."""

    table: jax.Array  # rows of the embedding table (the placeholder's own row at images)
    merged: jax.Array  # what entered the backbone (visual embeddings at images)
    is_image: jax.Array


def embeddings(x: HeadInput) -> tuple[jax.Array, jax.Array]:
    """Option 1: visual embeddings as they entered the backbone. Returns (e_BTD, which positions are keys)."""
    return x.merged, jnp.ones_like(x.is_image)


def embeddings_stopped(x: HeadInput) -> tuple[jax.Array, jax.Array]:
    """Option 1, through which the encoder gets no gradient."""
    merged_BTD = jnp.where(x.is_image[..., None], jax.lax.stop_gradient(x.merged), x.merged)
    return embeddings(x._replace(merged=merged_BTD))


def masked(x: HeadInput) -> tuple[jax.Array, jax.Array]:
    """Option 2: text-only MTP; images give no embedding and are no keys."""
    return jnp.where(x.is_image[..., None], 0.0, x.table), ~x.is_image


def image_token(x: HeadInput) -> tuple[jax.Array, jax.Array]:
    """Option 3: the shared `<|image|>` row at every visual position, positions kept."""
    return x.table, jnp.ones_like(x.is_image)


OPTIONS: dict[str, Callable[[HeadInput], tuple[jax.Array, jax.Array]]] = {
    "embeddings": embeddings,
    "embeddings_stopped": embeddings_stopped,
    "masked": masked,
    "image_token": image_token,
}


def layer_params(cfg: MTPConfig, params: dict, k: int) -> dict:
    """Those of the layer that depth k = 1..K applies."""
    return params if cfg.weights == "shared" else jax.tree.map(lambda x: x[k - 1], params)


def apply(
    cfg: MTPConfig, params: dict, h_BTD: jax.Array, inputs: HeadInput, tokens: Any
) -> tuple[list[jax.Array], list[dict[str, jax.Array]]]:
    """Normed hidden states [B, T, D] of depths 1..K, ready for the backbone's head, and what the block says at each.

    h_BTD: the backbone's hidden state, as cfg.h_prev says. inputs: of the rows; its table [B, X, D] of
    `context.overlapping` tokens, K more a chunk. tokens: TokenInput of the rows. Hidden states and `merged` are in the
    devices' order where rows are split (`parallel.context`), tokens and is_image are not. Entries within k positions of
    the end of a segment embed a token of the next one: they are finite, no valid position attends to them (they come
    later in their own segment), and the loss must leave them out (`losses.mtp`).
    """
    slots_BT = jnp.broadcast_to(jnp.arange(tokens.tokens.shape[1]), tokens.tokens.shape)
    # With "masked" an image sees nothing, not even itself, where a row begins with it.
    mark = None if cfg.option == "masked" else IN_ORDER
    query = Span(context.dealt(tokens.segments), context.dealt(slots_BT), in_order=mark)
    given = [_at_depth(cfg, inputs, tokens.positions, k) for k in range(1, cfg.depth + 1)]
    own = None if cfg.weights == "shared" else params
    layer = MTPLayer(cfg.decoder.block)

    def depth(h_BTD: jax.Array, given: tuple) -> tuple[Any, Any]:
        (e_BTD, is_key_BT, positions_BT3), own = given
        key = query._replace(segments=jnp.where(is_key_BT, query.segments, -1))
        weights, rope = params if own is None else own, cfg.decoder.rope(positions_BT3)
        pre_BTD, post_BTD, _, aux = applied(layer, weights, e_BTD, h_BTD, rope, query, key)
        return post_BTD if cfg.h_prev == "post_norm" else pre_BTD, (post_BTD, aux)

    if cfg.decoder.remat != "none":
        depth = jax.checkpoint(depth, policy=policy(cfg.decoder.remat), prevent_cse=False)
    # A loop, so that a program has one such layer however many depths there are.
    _, said = jax.lax.scan(depth, h_BTD, (jax.tree.map(lambda *xs: jnp.stack(xs), *given), own))
    depths = [jax.tree.map(lambda x, k=k: x[k], said) for k in range(cfg.depth)]
    return [hidden for hidden, _ in depths], [aux for _, aux in depths]


def _at_depth(cfg: MTPConfig, inputs: HeadInput, positions_BT3: jax.Array, k: int) -> tuple:
    """(e_BTD, which positions are keys, positions_BT3) of depth k."""
    positions_BT3, is_image_BT = (context.dealt(jnp.roll(x, -k, axis=1)) for x in (positions_BT3, inputs.is_image))
    table_BTD, merged_BTD = context.ahead(inputs.table, k, cfg.depth), context.shifted(inputs.merged, k)
    return *OPTIONS[cfg.option](HeadInput(table_BTD, merged_BTD, is_image_BT)), positions_BT3
