"""Stage 1: CogViT sees an image with 35 % of its patches replaced by a mask token and predicts, at those patches, what
its teachers see there. One small head a teacher (LayerNorm, Linear, GELU, Linear), thrown away afterwards.

The paper fixes the ratio, the size and the two teachers; heads and token replacement (as BEiT and EVA-02 do) are ours.
params: {"vision", "mask", "heads"}.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.models import cogvit
from glmv_jax.models.api import applied
from glmv_jax.models.layers import LayerNorm, Linear, normal, param
from glmv_jax.typing import Params, VisionInput


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    width: int

    def module(self) -> nn.Module:
        return MaskToken(self)

    def example(self) -> tuple:
        return ()


class MaskToken(nn.Module):
    cfg: MaskConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        return param(self, "token", normal(0.02), (self.cfg.width,), ("norm",))


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """features: (teacher name, channels) pairs."""

    width: int
    hidden: int
    features: tuple[tuple[str, int], ...]
    dtype: str = "float32"

    def module(self) -> nn.Module:
        return Heads(self)

    def example(self) -> tuple:
        return (jnp.zeros((1, 4, self.width)),)


class Heads(nn.Module):
    cfg: HeadsConfig

    @nn.compact
    def __call__(self, x_BPD: jax.Array) -> dict[str, jax.Array]:
        """Teacher name -> [B, P, C]."""
        c = self.cfg
        predicted = {}
        for name, channels in c.features:
            h = LayerNorm(name=f"{name}_norm")(x_BPD)
            h = jax.nn.gelu(Linear(c.hidden, ("embed", "mlp"), True, c.dtype, name=f"{name}_in")(h))
            predicted[name] = Linear(channels, ("mlp", "feature"), True, c.dtype, name=f"{name}_out")(h)
        return predicted


@dataclasses.dataclass(frozen=True)
class MIMConfig:
    vision: cogvit.CogViTConfig
    heads: HeadsConfig

    def parts(self) -> dict[str, Any]:
        return {"vision": self.vision, "mask": MaskConfig(self.vision.width), "heads": self.heads}

    def flops(self, patches: int) -> float:
        """Forward FLOPs of one image, teachers not counted."""
        channels = sum(c for _, c in self.heads.features)
        heads = 2 * patches * self.heads.hidden * (len(self.heads.features) * self.vision.width + channels)
        return self.vision.flops(patches) + heads


def apply(cfg: MIMConfig, params: Params, vision: VisionInput, mask_BP: jax.Array) -> dict[str, jax.Array]:
    """Predicted features [B, P, C] a teacher, at every patch (the loss picks the masked ones)."""
    features_BPD = cogvit.apply(cfg.vision, params["vision"], vision, mask_BP, params["mask"]["token"])
    return applied(Heads(cfg.heads), params["heads"], features_BPD)
