"""CogViT, the vision encoder, and the merger that carries its patches into the language model's width.

The public form is transformers' `GlmOcrVisionModel`: RMSNorm, biases, QK-norm before 2-D rotary positions, SwiGLU, one
attention segment a frame, no position table and no class token. 24 blocks of the `l` size hold 403,024,896 parameters.
Patches come in 2x2 merge-block order (`typing.VisionInput`), so the stride-2 convolution of the public code is a dense
layer over four neighbouring rows. Stages 1 and 2 use the trunk alone; the VLM puts the merger on it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.api import applied
from glmv_jax.models.block import BlockConfig, stack
from glmv_jax.models.layers import LayerNorm, Linear, RMSNorm, SwiGLU
from glmv_jax.parallel.micro import in_chunks
from glmv_jax.parallel.remat import named, policy
from glmv_jax.parallel.rules import constrain
from glmv_jax.typing import CLIP_MEAN, CLIP_STD, UserError, VisionInput


@dataclasses.dataclass(frozen=True)
class CogViTConfig:
    """Defaults are the public 403M encoder (GLM-OCR's vision_config)."""

    depth: int = 24
    width: int = 1024
    heads: int = 16
    mlp: int = 4096
    patch: int = 14
    temporal_patch: int = 2
    channels: int = 3
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    swiglu_limit: float | None = None
    dtype: str = "float32"
    remat: str = "none"  # of the blocks, see `parallel.remat`; with any, normalised pixels are made anew too
    chunk: int = 0  # patches of a device that pass a block's MLP at a time; 0: all
    unroll: int = 1  # blocks a turn of the loop over layers: on a GPU a whole loop's copies cost a sixth of the step

    @property
    def patch_dim(self) -> int:
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            self.width, self.heads, self.mlp, bias=True, qk_norm=True, norm_eps=self.norm_eps,
            swiglu_limit=self.swiglu_limit, rotate=rope_lib.rotate_half, dtype=self.dtype, chunk=self.chunk,
        )  # fmt: skip

    def flops(self, patches: int) -> float:
        """Forward FLOPs of one row of `patches` patches that all see each other."""
        return patches * (2 * self.patch_dim * self.width + self.depth * self.block.flops(patches))

    def module(self) -> nn.Module:
        return CogViT(self)

    def example(self) -> tuple:
        return (example_rows(self.patch_dim),)


class CogViT(nn.Module):
    cfg: CogViTConfig

    @nn.compact
    def __call__(
        self, vision: VisionInput, mask_BP: jax.Array | None = None, mask_token_D: Any = None
    ) -> jax.Array:
        """Patch features [B, P, D] after the final norm. Where mask_BP is true the patch's embedding is replaced by
        mask_token_D before the blocks (masked image modelling as in BEiT: all positions stay in the sequence)."""
        c = self.cfg
        # Only bytes are kept for the gradient: normalised, a patch is eight times as large.
        embed = CogViT.embedded if c.remat == "none" else nn.remat(CogViT.embedded)
        x_BPD = embed(self, vision.patches)
        if mask_BP is not None:
            x_BPD = jnp.where(mask_BP[..., None], mask_token_D.astype(x_BPD.dtype), x_BPD)
        x_BPD = constrain(self.placed(x_BPD, vision), "batch", "length", "activation")
        rope = rope_lib.axial(vision.yx, c.block.k, c.rope_theta)
        span = Span(vision.frame, in_order=IN_ORDER)
        x_BPD, *_ = stack(c.block, c.depth, c.remat, x_BPD, rope, span, span, unroll=c.unroll)
        return RMSNorm("norm", c.norm_eps, name="norm")(x_BPD)

    def embedded(self, patches: jax.Array) -> jax.Array:
        """[B, P, D] of patches as `VisionInput` has them."""
        c = self.cfg
        with jax.named_scope("patch_embed"):
            pixels = normalised(patches, c.channels, c.temporal_patch, c.patch)
            return Linear(c.width, ("patch", "embed"), True, c.dtype, name="patch_embed")(pixels)

    def placed(self, x_BPD: jax.Array, vision: VisionInput) -> jax.Array:
        """What enters the blocks, from the patches' embeddings. Here nothing is added: attention rotates."""
        return x_BPD


@dataclasses.dataclass(frozen=True)
class MergerConfig:
    """Defaults are GLM-OCR's: 4 x 1024 -> 1536, MLP 4608 (the public code's out_hidden_size * in_channels)."""

    in_width: int = 1024
    width: int = 1536
    hidden: int = 4608
    norm_eps: float = 1e-5
    swiglu_limit: float | None = None
    dtype: str = "float32"
    remat: str = "none"  # of the merger as a whole, see `parallel.remat`
    chunk: int = 0  # patches of a device that are merged at a time, forward and backward (so remat is "full"); 0: all

    def flops(self, patches: int) -> float:
        return 2 * patches / 4 * (4 * self.in_width * self.width + self.width**2 + 3 * self.width * self.hidden)

    def module(self) -> nn.Module:
        return Merger(self)

    def example(self) -> tuple:
        return (jnp.zeros((1, 4, self.in_width)),)


class Merger(nn.Module):
    """Four neighbouring patches to one visual token: dense 2x2 downsample, projection, LayerNorm, GELU, SwiGLU."""

    cfg: MergerConfig

    @nn.compact
    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        """[B, P, in_width] in merge-block order -> [B, P / 4, width]."""
        c = self.cfg
        B, P, D = x_BPD.shape
        x_BMD = x_BPD.reshape(B, P // 4, 4 * D)
        x_BMD = Linear(c.width, ("merge", "projection"), True, c.dtype, name="downsample")(x_BMD)
        x_BMD = Linear(c.width, ("embed", "projection"), False, c.dtype, name="proj")(x_BMD)
        x_BMD = jax.nn.gelu(LayerNorm(c.norm_eps, name="norm")(x_BMD), approximate=False)
        return SwiGLU(c.hidden, c.width, False, c.swiglu_limit, c.dtype, name="mlp")(x_BMD)


def normalised(patches: jax.Array, channels: int, frames: int, patch: int) -> jax.Array:
    """[..., C*p*p] uint8 pixels of still images, or [..., C*frames*p*p] of films -> [..., C*frames*p*p] float32,
    normalised, a still frame as many times as a patch has frames. Patches that are float have been normalised and stay
    as they are. Raises UserError for vectors of another length."""
    if patches.dtype != jnp.uint8:
        return patches
    shape = (channels, 1, 1)
    held, rest = divmod(patches.shape[-1], channels * patch**2)
    if rest or held not in (1, frames):
        raise UserError(f"patches of {patches.shape[-1]} pixels for a tower whose patches have {channels} x {patch} x "
                        f"{patch}, or {frames} frames of them; make them with its patch size and data.video")
    pixels = patches.reshape(*patches.shape[:-1], channels, held, -1).astype(jnp.float32) * jnp.float32(1 / 255)
    pixels = (pixels - jnp.array(CLIP_MEAN).reshape(shape)) / jnp.array(CLIP_STD).reshape(shape)
    pixels = jnp.broadcast_to(pixels, (*pixels.shape[:-2], frames, pixels.shape[-1]))
    return pixels.reshape(*patches.shape[:-1], -1)


def example_rows(patch_dim: int) -> VisionInput:
    """The smallest input of a vision tower, for shapes."""
    return VisionInput(jnp.zeros((1, 4, patch_dim)), jnp.zeros((1, 4, 2), jnp.int32), jnp.ones((1, 4), jnp.int32))


def apply(
    cfg: CogViTConfig, params: dict, vision: VisionInput, mask_BP: jax.Array | None = None,
    mask_token_D: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Patch features [B, P, D] after the final norm; see CogViT. `cfg` may be of a tower derived from it."""
    return applied(cfg.module(), params, vision, mask_BP, mask_token_D)


@jax.named_scope("projector")
def merge(cfg: MergerConfig, params: dict, x_BPD: jax.Array) -> jax.Array:
    """Visual tokens [B, P / 4, width] from patch features; see Merger."""

    def merged(x_BPD: jax.Array) -> jax.Array:
        return applied(Merger(cfg), params, named(x_BPD))

    if cfg.remat == "none" and not cfg.chunk:
        return merged(x_BPD)
    return in_chunks(merged, x_BPD, cfg.chunk, 4, policy(cfg.remat))
