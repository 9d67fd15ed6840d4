"""Stage 2: CogViT and a text tower meeting in one embedding space, with a learnt temperature and bias.

The paper names neither CogViT's text tower nor its pooling. Here images pool with an attention probe (SigLIP's MAP
head); the text tower is the same block, bidirectional, with learned positions, and pools with a mean. A tower that
starts as the identity makes that a bag of words, which is what a few thousand texts can teach.
params: {"vision", "image_head", "text", "text_head", "scale"}; "vision" is the trunk that stages 1 and 3 share.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.span import Span
from glmv_jax.models import cogvit
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.api import applied
from glmv_jax.models.block import BlockConfig, probed, stack
from glmv_jax.models.layers import Embedding, Linear, RMSNorm, SwiGLU, param
from glmv_jax.typing import Params, VisionInput


@dataclasses.dataclass(frozen=True)
class TextConfig:
    vocab: int
    length: int
    depth: int
    width: int
    heads: int
    mlp: int
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: str = "none"

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            self.width, self.heads, self.mlp, qk_norm=True, identity=True, norm_eps=self.norm_eps,
            rotate=rope_lib.no_rotation, dtype=self.dtype,
        )  # fmt: skip

    def row_length(self, texts: int) -> int:
        """Tokens of a row of so many texts: they share it."""
        return self.length

    def flops(self, tokens: int) -> float:
        return tokens * self.depth * self.block.flops(tokens)

    def module(self) -> nn.Module:
        return TextTower(self)

    def example(self) -> tuple:
        return jnp.ones((1, self.length), jnp.int32), jnp.ones((1, self.length), jnp.int32)


class TextTower(nn.Module):
    """Features [B, T, D] of rows of texts side by side: none sees another, and each has its own positions 0, 1, ..."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        c = self.cfg
        if tokens_BT.shape[1] > c.length:
            raise ValueError(f"rows of {tokens_BT.shape[1]} tokens, but the text tower has {c.length} positions")
        table_VD = Embedding(c.vocab, c.width, name="embed")()
        position_TD = Embedding(c.length, c.width, "position", name="position")()
        with jax.named_scope("embed"):
            x_BTD = jnp.take(table_VD, tokens_BT, axis=0) + jnp.take(position_TD, _within(segments_BT), axis=0)
        span = Span(segments_BT)
        x_BTD, *_ = stack(c.block, c.depth, c.remat, x_BTD.astype(c.dtype), None, span, span)
        return RMSNorm("norm", c.norm_eps, name="norm")(x_BTD)


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """An attention probe over a tower's features, an MLP, and a projection to the shared width."""

    width: int
    heads: int
    mlp: int
    out: int
    norm_eps: float = 1e-5
    dtype: str = "float32"

    def module(self) -> nn.Module:
        return Pool(self)

    def example(self) -> tuple:
        return jnp.zeros((1, 2, self.width)), jnp.ones((1, 2), jnp.int32)


class Pool(nn.Module):
    cfg: PoolConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """[B, E], not normalised, of each row's segment 1. MAP: out = attn(probe, x); out += mlp(norm(out))."""
        c = self.cfg
        out_BD = probed(self, x_BTD, Span(segments_BT), c.heads, c.dtype)
        branch_BD = RMSNorm("norm", c.norm_eps, name="norm")(out_BD)
        out_BD += SwiGLU(c.mlp, c.width, True, None, c.dtype, name="mlp")(branch_BD)
        return Linear(c.out, ("embed", "projection"), False, c.dtype, name="projection")(out_BD)


@dataclasses.dataclass(frozen=True)
class MeanConfig:
    """The mean of a tower's features over each segment, and a projection to the shared width."""

    width: int
    out: int
    dtype: str = "float32"

    def module(self) -> nn.Module:
        return Mean(self)

    def example(self) -> tuple:
        return jnp.zeros((1, 2, self.width)), jnp.ones((1, 2), jnp.int32), 1


class Mean(nn.Module):
    cfg: MeanConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array, count: int) -> jax.Array:
        """[B, count, E] of segments 1 to count, not normalised."""
        c = self.cfg
        in_BNT = (segments_BT[:, None] == jnp.arange(1, count + 1)[:, None]).astype(x_BTD.dtype)
        mean_BND = in_BNT @ x_BTD / jnp.maximum(in_BNT.sum(-1, keepdims=True), 1)
        return Linear(c.out, ("embed", "projection"), False, c.dtype, name="projection")(mean_BND)


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """t = log temperature (log 10) and bias (-10), SigLIP's initial values."""

    log_scale: float = math.log(10.0)
    bias: float = -10.0

    def module(self) -> nn.Module:
        return Scale(self)

    def example(self) -> tuple:
        return ()


class Scale(nn.Module):
    cfg: ScaleConfig

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        constant = nn.initializers.constant
        return (
            param(self, "log_scale", constant(self.cfg.log_scale), (), ()),
            param(self, "bias", constant(self.cfg.bias), (), ()),
        )


@dataclasses.dataclass(frozen=True)
class TwoTowerConfig:
    """text, text_head: our tower and its mean, or the text side of a public model (`models.siglip`): a tower is called
    with (tokens, segments) and gives features, a head with (features, segments, count)."""

    vision: cogvit.CogViTConfig
    text: Any
    image_head: PoolConfig
    text_head: Any
    scale: ScaleConfig = ScaleConfig()

    def parts(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


class TwoTowerOutput(NamedTuple):
    """Unit embeddings, image [B, E] and text [B, N, E] float32, and the scalars of the sigmoid loss."""

    image: jax.Array
    text: jax.Array
    log_scale: jax.Array
    bias: jax.Array


def embed_image(cfg: TwoTowerConfig, params: Params, vision: VisionInput) -> jax.Array:
    """Unit embeddings [B, E], one image a row."""
    features_BPD = cogvit.apply(cfg.vision, params["vision"], vision)
    real_BP = (vision.frame != 0).astype(jnp.int32)
    return _unit(applied(Pool(cfg.image_head), params["image_head"], features_BPD, real_BP))


def embed_text(cfg: TwoTowerConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Unit embeddings [B, E], one text a row; zeros after its end are padding."""
    segments_BT = jax.lax.cummax((tokens_BT != 0).astype(jnp.int32), axis=1, reverse=True)
    return embed_texts(cfg, params, tokens_BT, segments_BT, 1)[:, 0]


def embed_texts(
    cfg: TwoTowerConfig, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array, count: int
) -> jax.Array:
    """Unit embeddings [B, count, E] of texts that stand side by side in a row as segments 1 to count."""
    features_BTD = cfg.text.module().apply({"params": params["text"]}, tokens_BT, segments_BT)
    return _unit(cfg.text_head.module().apply({"params": params["text_head"]}, features_BTD, segments_BT, count))


def scale(cfg: TwoTowerConfig, params: Params) -> tuple[jax.Array, jax.Array]:
    """(log scale, bias) of the logits."""
    return applied(Scale(cfg.scale), params["scale"])


def apply(
    cfg: TwoTowerConfig, params: Params, vision: VisionInput, tokens_BT: jax.Array, segments_BT: jax.Array, count: int
) -> TwoTowerOutput:
    """Images and their texts, `count` of each image in its row."""
    text_BNE = embed_texts(cfg, params, tokens_BT, segments_BT, count)
    return TwoTowerOutput(embed_image(cfg, params, vision), text_BNE, *scale(cfg, params))


def _within(segments_BT: jax.Array) -> jax.Array:
    """Each position's place in its segment."""
    index_T = jnp.arange(segments_BT.shape[1])
    first_BT = segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index_T - jax.lax.cummax(jnp.where(first_BT, index_T, 0), axis=1)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
