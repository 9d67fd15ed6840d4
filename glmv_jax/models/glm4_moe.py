"""The GLM-4.5 decoder, as in GLM-4.5V and GLM-4.6V: grouped-query attention, the first layers dense, the others
mixtures of experts; one norm before each branch, rotary sections over half of a head, dimension i paired with i + K'/2.
Sources: transformers `glm4v_moe/modeling_glm4v_moe.py` (Glm4vMoeTextModel), and `glm4_moe/modeling_glm4_moe.py` for the
QK-norm, which text models may have.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.span import Span
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.block import Block, BlockConfig
from glmv_jax.models.decoder import shared_prompts
from glmv_jax.models.expert_decoder import ExpertDecoderConfig
from glmv_jax.models.moe import MoE, MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLM4MoEConfig(ExpertDecoderConfig):
    """Defaults are the text model of GLM-4.5V (106 B) without an MTP layer."""

    vocab: int = 151552
    depth: int = 46
    width: int = 4096
    heads: int = 96
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 10944
    dense: int = 1
    expert_mlp: int = 1408
    experts: int = 128
    rotary_fraction: float = 0.5
    qkv_bias: bool = True
    qk_norm: bool = False

    @property
    def stacks(self) -> list[tuple[BlockConfig, int]]:
        """(block, how often), in order."""
        dense = BlockConfig(self.width, self.heads, self.mlp, **self._attention)
        runs = [(dense, min(self.dense, self.depth)), (self.block, self.depth - self.dense)]
        return [(block, times) for block, times in runs if times > 0]

    @property
    def block(self) -> MoEBlockConfig:
        """A layer with experts; the MTP head's too."""
        return MoEBlockConfig(self.width, self.heads, 0, moe=self.moe, **self._attention)

    @property
    def _attention(self) -> dict:
        return dict(
            kv_heads=self.kv_heads, head_dim=self.head_dim, qkv_bias=self.qkv_bias, qk_norm=self.qk_norm,
            norm_eps=self.norm_eps, rotate=rope_lib.rotate_half, dtype=self.dtype,
        )  # fmt: skip

    def rope(self, positions_BT3: jax.Array) -> rope_lib.Rope:
        rotary_dim = int(self.head_dim * self.rotary_fraction)
        return rope_lib.sections(
            positions_BT3, rotary_dim, self.rope_theta, self.rope_split, rope_lib.rotate_half)  # fmt: skip

    def share_prompts(self, cache: dict, length_B: jax.Array, group: int, length: int) -> tuple[dict, int, jax.Array]:
        """As `decoder.DecoderConfig.share_prompts`: prompts are not copied."""
        prompt = {name: shared_prompts(layers, length_B) for name, layers in cache["layers"].items()}
        return self.init_cache(len(length_B) * group, length) | {"prompt": prompt}, length, jnp.zeros(1, jnp.int32)


@dataclasses.dataclass(frozen=True)
class MoEBlockConfig(BlockConfig):
    """A block whose second branch is a mixture of experts (its `mlp` is 0)."""

    moe: MoEConfig = dataclasses.field(kw_only=True)

    @property
    def layer(self) -> type[nn.Module]:
        return MoEBlock

    def flops(self, keys: float) -> float:
        """Multiply-adds x 2 of one token through the forward pass when it sees `keys` keys."""
        return super().flops(keys) + self.moe.flops()


class MoEBlock(Block):
    """x += Attn(norm(x)); x += MoE(norm(x)). aux: "load" [E] and "balance", as `moe.MoE`."""

    cfg: MoEBlockConfig

    def mlp(self, x_BTD: jax.Array, query: Span) -> tuple[jax.Array, dict[str, jax.Array]]:
        return MoE(self.cfg.moe, name="moe")(x_BTD, query.segments > 0)
