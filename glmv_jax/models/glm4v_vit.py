"""The vision tower of GLM-4.1V, GLM-4.5V and GLM-4.6V: CogViT's trunk without biases and QK-norm, and with a norm on
the patches' embeddings and a learned table of positions beside the rotary ones.

The table is a square, resized to the grid of each frame: bicubic without antialiasing, its edge repeated outside. That
is torch's `grid_sample(mode="bicubic", padding_mode="border", align_corners=False)`, a = -0.75 in Keys' kernel; where
grid and table are equal it is the table. The merger is CogViT's.
Source: transformers `glm4v/modeling_glm4v.py` (Glm4vVisionModel).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.models import rope as rope_lib
from glmv_jax.models.block import BlockConfig
from glmv_jax.models.cogvit import CogViT, CogViTConfig
from glmv_jax.models.layers import Embedding, RMSNorm
from glmv_jax.typing import VisionInput


@dataclasses.dataclass(frozen=True)
class Glm4vViTConfig(CogViTConfig):
    """Defaults are GLM-4.1V's. `table` is the side of the square of learned positions (336 pixels / 14)."""

    width: int = 1536
    heads: int = 12
    table: int = 24
    qkv_bias: bool = False

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            self.width, self.heads, self.mlp, qkv_bias=self.qkv_bias, norm_eps=self.norm_eps,
            swiglu_limit=self.swiglu_limit, rotate=rope_lib.rotate_half, dtype=self.dtype, chunk=self.chunk,
        )  # fmt: skip

    def flops(self, patches: int) -> float:
        """Forward FLOPs of one row of `patches` patches that all see each other."""
        return super().flops(patches) + patches * 2 * self.table**2 * self.width

    def module(self) -> nn.Module:
        return Glm4vViT(self)


class Glm4vViT(CogViT):
    """CogViT with other inputs to its blocks; a frame's patches must all be there, as its grid is read from `yx`."""

    cfg: Glm4vViTConfig

    def placed(self, x_BPD: jax.Array, vision: VisionInput) -> jax.Array:
        """norm(x) + the resized table at each patch."""
        c = self.cfg
        table_ND = Embedding(c.table**2, c.width, "position", name="position")()
        position_BPD = bicubic(table_ND, vision.yx, grids(vision.yx, vision.frame))
        return RMSNorm("norm", c.norm_eps, name="embed_norm")(x_BPD) + position_BPD.astype(x_BPD.dtype)


def grids(yx_BP2: jax.Array, frame_BP: jax.Array) -> jax.Array:
    """[B, P, 2]: rows and columns of the frame that each patch belongs to. Frames are numbered from 1 within a row."""
    P = frame_BP.shape[1]
    largest = jax.vmap(lambda yx, frame: jax.ops.segment_max(yx, frame, num_segments=P + 1)[frame])
    return largest(yx_BP2, frame_BP) + 1


def bicubic(table_ND: jax.Array, yx_BP2: jax.Array, grid_BP2: jax.Array) -> jax.Array:
    """[B, P, D]: the square table resized to each patch's grid, at the patch; in float32."""
    n = round(table_ND.shape[0] ** 0.5)
    centre_BP2 = (yx_BP2.astype(jnp.float32) + 0.5) / grid_BP2.astype(jnp.float32) * n - 0.5
    tap_BP24 = jnp.floor(centre_BP2)[..., None] + jnp.arange(-1, 3)
    at_BP24n = jnp.clip(tap_BP24, 0, n - 1)[..., None] == jnp.arange(n)
    weight_BP2n = jnp.sum(_keys(centre_BP2[..., None] - tap_BP24)[..., None] * at_BP24n, axis=-2)
    weight_BPN = weight_BP2n[:, :, 0, :, None] * weight_BP2n[:, :, 1, None, :]
    # In full precision: rounding the weights would shift the positions of all patches.
    return jnp.matmul(weight_BPN.reshape(*yx_BP2.shape[:2], n * n), table_ND, precision="highest")


def _keys(x: jax.Array, a: float = -0.75) -> jax.Array:
    """Keys' cubic convolution kernel for |x| <= 2 (IEEE ASSP 1981, equation 4, with a as torch has it)."""
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return jnp.where(x <= 1, near, far)
