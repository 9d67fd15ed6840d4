"""DINOv3's ViT (Simeoni et al., arXiv 2508.10104): the texture teacher of stage 1.

A class token and register tokens stand before the patches; patches have rotary positions, relative to their image
(centres of patches in [-1, 1]), the tokens before them none. Patches may stand in any order; one image a row.
Source: transformers `modeling_dinov3_vit.py`, in evaluation mode (no jitter of positions, no dropped paths).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.api import applied
from glmv_jax.models.block import stack
from glmv_jax.models.cogvit import example_rows
from glmv_jax.models.layers import LayerNorm, Linear, normal, param
from glmv_jax.models.siglip import grid
from glmv_jax.models.vit import ViTBlockConfig
from glmv_jax.typing import Params, VisionInput


@dataclasses.dataclass(frozen=True)
class DINOv3Config:
    """Defaults are ViT-L/16. activation: "gelu", or "swiglu" (H+ and 7B)."""

    depth: int = 24
    width: int = 1024
    heads: int = 16
    mlp: int = 4096
    patch: int = 16
    registers: int = 4
    channels: int = 3
    biases: str = "qvo"
    activation: str = "gelu"
    rope_theta: float = 100.0
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: str = "none"

    @property
    def block(self) -> ViTBlockConfig:
        return ViTBlockConfig(
            self.width, self.heads, self.mlp, self.biases, self.activation, layer_scale=True, norm_eps=self.norm_eps,
            rotate=rope_lib.rotate_half, dtype=self.dtype,
        )  # fmt: skip

    @property
    def patch_dim(self) -> int:
        return self.patch**2 * self.channels

    def flops(self, patches: int) -> float:
        """Forward FLOPs of one image of `patches` patches."""
        tokens = 1 + self.registers + patches
        return 2 * patches * self.patch_dim * self.width + tokens * self.depth * self.block.flops(tokens)

    def module(self) -> nn.Module:
        return DINOv3(self)

    def example(self) -> tuple:
        return (example_rows(self.patch_dim),)


class DINOv3(nn.Module):
    """(features [B, P, D] of the patches, class token [B, D]), both after the last norm. A patch is (y, x, channel)."""

    cfg: DINOv3Config

    @nn.compact
    def __call__(self, vision: VisionInput) -> tuple[jax.Array, jax.Array]:
        c = self.cfg
        B, first = vision.patches.shape[0], 1 + c.registers
        before_FD = param(self, "class_token", normal(0.02), (c.width,), ("norm",))[None]
        if c.registers:
            registers_RD = param(self, "registers", normal(0.02), (c.registers, c.width), (None, "norm"))
            before_FD = jnp.concatenate([before_FD, registers_RD])
        x_BPD = Linear(c.width, ("patch", "embed"), True, c.dtype, name="patch_embed")(vision.patches)
        before_BFD = jnp.broadcast_to(before_FD.astype(c.dtype), (B, first, c.width))
        x_BTD = jnp.concatenate([before_BFD, x_BPD], axis=1)

        size_B12 = grid(vision.yx, vision.frame)[:, None].astype(jnp.float32)
        centre_BP2 = 2.0 * (vision.yx + 0.5) / size_B12 - 1.0
        # An angle of zero rotates nothing: the tokens before the patches have no position.
        centre_BT2 = jnp.pad(centre_BP2, ((0, 0), (first, 0), (0, 0)))
        rope = rope_lib.axial(2.0 * math.pi * centre_BT2, c.block.k, c.rope_theta)
        segments_BT = jnp.pad((vision.frame > 0).astype(jnp.int32), ((0, 0), (first, 0)), constant_values=1)
        span = Span(segments_BT, in_order=IN_ORDER)
        x_BTD, *_ = stack(c.block, c.depth, c.remat, x_BTD, rope, span, span)
        x_BTD = LayerNorm(c.norm_eps, name="norm")(x_BTD)
        return x_BTD[:, first:], x_BTD[:, 0]


def apply(cfg: DINOv3Config, params: Params, vision: VisionInput) -> tuple[jax.Array, jax.Array]:
    """(features [B, P, D], class token [B, D])."""
    return applied(DINOv3(cfg), params, vision)
