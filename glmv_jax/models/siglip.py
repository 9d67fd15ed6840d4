"""SigLIP and SigLIP 2 (Tschannen et al., arXiv 2502.14786): teachers, and baselines to evaluate beside.

One image tower for the checkpoints of fixed size (Hugging Face `siglip`) and of native size (`siglip2`, NaFlex): their
learned positions are a square table that is resized to the grid of each image, antialiased and bilinear; where grid and
table are equal that is the table. Patches may stand in any order, `yx` says where they belong; one image a row.
Text: both directions, no mask on padding, and the last token of a text of full length is the pooled one. Tower and head
are parts that `two_tower` takes as they are.

Sources: big_vision `models/proj/image_text/naflex_vit.py`, `text_transformer.py`; transformers `modeling_siglip2.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.models.api import applied
from glmv_jax.models.block import probed, stack
from glmv_jax.models.cogvit import example_rows
from glmv_jax.models.layers import Embedding, LayerNorm, Linear
from glmv_jax.models.two_tower import Scale, ScaleConfig
from glmv_jax.models.vit import ViTBlockConfig, mlp_of
from glmv_jax.typing import Params, VisionInput


@dataclasses.dataclass(frozen=True)
class _TowerConfig:
    """What both towers have; defaults are So400m's."""

    depth: int = 27
    width: int = 1152
    heads: int = 16
    mlp: int = 4304
    activation: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"

    @property
    def block(self) -> ViTBlockConfig:
        return ViTBlockConfig(
            self.width, self.heads, self.mlp, activation=self.activation, norm_eps=self.norm_eps, dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(_TowerConfig):
    """Defaults are those at 224 px. `table` is the side of the square of learned positions."""

    patch: int = 14
    table: int = 16
    channels: int = 3
    head: bool = True  # whether there is an attention pool

    @property
    def patch_dim(self) -> int:
        return self.patch**2 * self.channels

    def flops(self, patches: int) -> float:
        """Forward FLOPs of one image of `patches` patches."""
        return patches * (2 * self.patch_dim * self.width + self.depth * self.block.flops(patches))

    def module(self) -> nn.Module:
        return SiglipVision(self)

    def example(self) -> tuple:
        return (example_rows(self.patch_dim),)


class SiglipVision(nn.Module):
    """(features [B, P, D] after the last norm, pooled [B, D] or None). A patch is the vector (y, x, channel)."""

    cfg: SiglipVisionConfig

    @nn.compact
    def __call__(self, vision: VisionInput) -> tuple[jax.Array, jax.Array | None]:
        c = self.cfg
        x_BPD = Linear(c.width, ("patch", "embed"), True, c.dtype, name="patch_embed")(vision.patches)
        table_ND = Embedding(c.table**2, c.width, "position", name="position")()
        with jax.named_scope("patch_embed"):
            x_BPD = x_BPD + resized_table(table_ND, vision.yx, grid(vision.yx, vision.frame)).astype(x_BPD.dtype)
        span = Span((vision.frame > 0).astype(jnp.int32), in_order=IN_ORDER)
        x_BPD, *_ = stack(c.block, c.depth, c.remat, x_BPD, None, span, span)
        x_BPD = LayerNorm(c.norm_eps, name="norm")(x_BPD)
        return x_BPD, AttentionPool(c, name="head")(x_BPD, span) if c.head else None


class AttentionPool(nn.Module):
    """SigLIP's MAP head: out = attn(probe, x); out += MLP(LN(out))."""

    cfg: SiglipVisionConfig

    @nn.compact
    def __call__(self, x_BPD: jax.Array, span: Span) -> jax.Array:
        c = self.cfg
        out_BD = probed(self, x_BPD, span, c.heads, c.dtype)
        mlp = mlp_of(c.activation, c.mlp, c.width, c.dtype, "mlp")
        return out_BD + mlp(LayerNorm(c.norm_eps, name="norm")(out_BD))


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig(_TowerConfig):
    """`length`: tokens of a text, padding among them."""

    vocab: int = 256_000
    length: int = 64

    def row_length(self, texts: int) -> int:
        """Tokens of a row of so many texts: each has its own `length`."""
        return texts * self.length

    def flops(self, tokens: int) -> float:
        """Forward FLOPs of a row of `tokens` tokens."""
        return tokens * self.depth * self.block.flops(self.length)

    def module(self) -> nn.Module:
        return SiglipText(self)

    def example(self) -> tuple:
        return jnp.ones((1, self.length), jnp.int32), jnp.ones((1, self.length), jnp.int32)


class SiglipText(nn.Module):
    """Features [B, T, D] of rows of one or more texts of full length; padding is read like any token."""

    cfg: SiglipTextConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        c = self.cfg
        if tokens_BT.shape[1] % c.length:
            raise ValueError(f"rows of {tokens_BT.shape[1]} tokens, but the text tower reads {c.length} at a time")
        del segments_BT  # where a text begins follows from its length
        tokens = tokens_BT.reshape(-1, c.length)
        table_VD = Embedding(c.vocab, c.width, name="embed")()
        position_TD = Embedding(c.length, c.width, "position", name="position")()
        with jax.named_scope("embed"):
            x = (jnp.take(table_VD, tokens, axis=0) + position_TD).astype(c.dtype)
        span = Span(jnp.ones_like(tokens))
        x, *_ = stack(c.block, c.depth, c.remat, x, None, span, span)
        return LayerNorm(c.norm_eps, name="norm")(x).reshape(*tokens_BT.shape, c.width)


@dataclasses.dataclass(frozen=True)
class LastConfig:
    """The last feature of each text, and a projection to `out`, the width of the image tower's pool."""

    width: int = 1152
    out: int = 1152
    dtype: str = "float32"

    def module(self) -> nn.Module:
        return Last(self)

    def example(self) -> tuple:
        return jnp.zeros((1, 2, self.width)), jnp.ones((1, 2), jnp.int32), 1


class Last(nn.Module):
    cfg: LastConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array, count: int) -> jax.Array:
        """[B, count, E] of `count` texts of equal length, not normalised."""
        c = self.cfg
        del segments_BT
        last_BND = x_BTD.reshape(x_BTD.shape[0], count, -1, c.width)[:, :, -1]
        return Linear(c.out, ("embed", "projection"), True, c.dtype, name="projection")(last_BND)


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Both towers, the image tower alone (text and its head None) or the text side alone (vision None)."""

    vision: SiglipVisionConfig | None
    text: SiglipTextConfig | None = None
    text_head: LastConfig | None = None

    def parts(self) -> dict[str, Any]:
        scale = None if self.text is None else ScaleConfig()
        parts = {"vision": self.vision, "text": self.text, "text_head": self.text_head, "scale": scale}
        return {name: part for name, part in parts.items() if part is not None}


def embed_image(cfg: SiglipVisionConfig, params: Params, vision: VisionInput) -> tuple[jax.Array, jax.Array | None]:
    """(features [B, P, D], pooled [B, D], not normalised, or None)."""
    return applied(SiglipVision(cfg), params, vision)


def embed_text(cfg: SiglipConfig, params: Params, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(features [B, T, D], pooled [B, out], not normalised) of one text a row; `params` of the whole model."""
    segments_BT = jnp.ones_like(tokens_BT)
    parts = cfg.parts()
    features_BTD = applied(parts["text"].module(), params["text"], tokens_BT, segments_BT)
    pooled_BNE = applied(parts["text_head"].module(), params["text_head"], features_BTD, segments_BT, 1)
    return features_BTD, pooled_BNE[:, 0]


def scale(params: Params) -> tuple[jax.Array, jax.Array]:
    """(log scale, bias) of the logits."""
    return applied(Scale(ScaleConfig()), params)


def grid(yx_BP2: jax.Array, frame_BP: jax.Array) -> jax.Array:
    """[B, 2] rows and columns of patches of each row's image."""
    return jnp.where(frame_BP[..., None] > 0, yx_BP2 + 1, 1).max(1)


def resized_table(table_ND: jax.Array, yx_BP2: jax.Array, grid_B2: jax.Array) -> jax.Array:
    """[B, P, D]: the square table, resized to each image's grid, at its patches.

    Antialiased bilinear as Pillow, jax.image and torch (antialias=True) do it: a triangle that is as wide as the larger
    of a step of the table and a step of the grid, normalised inside the table.
    """
    n = round(table_ND.shape[0] ** 0.5)
    step_B12 = n / grid_B2[:, None].astype(jnp.float32)
    centre_BP2 = (yx_BP2 + 0.5) * step_B12 - 0.5
    away_BP2n = jnp.abs(jnp.arange(n) - centre_BP2[..., None]) / jnp.maximum(step_B12, 1.0)[..., None]
    weight_BP2n = jnp.maximum(1.0 - away_BP2n, 0.0)
    weight_BP2n = weight_BP2n / weight_BP2n.sum(-1, keepdims=True)
    weight_BPN = weight_BP2n[:, :, 0, :, None] * weight_BP2n[:, :, 1, None, :]
    return weight_BPN.reshape(*yx_BP2.shape[:2], n * n) @ table_ND
