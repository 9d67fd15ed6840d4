"""The block of public image and text encoders: LayerNorm in front, biases, a GELU or a gated MLP, optional layer scale.

It goes through the same `stack()` and the same attention as our own towers; SigLIP, SigLIP 2 and DINOv3 are made of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import linen as nn

from glmv_jax.kernels.span import Span
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.block import Attention
from glmv_jax.models.layers import LayerNorm, Linear, SwiGLU, fan_in, ones, param
from glmv_jax.parallel.rules import constrain

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class ViTBlockConfig:
    """biases: which of the attention's projections q, k, v, o have one. activation: a name of ACTIVATIONS, or
    "swiglu" for a gated MLP."""

    width: int
    heads: int
    mlp: int
    biases: str = "qkvo"
    activation: str = "gelu_pytorch_tanh"
    layer_scale: bool = False
    norm_eps: float = 1e-6
    rotate: Callable = rope_lib.no_rotation
    dtype: str = "float32"
    qk_norm: ClassVar[bool] = False

    @property
    def out_init(self) -> Callable:
        return fan_in

    @property
    def k(self) -> int:
        return self.width // self.heads

    @property
    def g(self) -> int:
        return self.heads

    @property
    def layer(self) -> type[nn.Module]:
        return ViTBlock

    def flops(self, keys: float) -> float:
        """Multiply-adds x 2 of one token through the forward pass when it sees `keys` keys."""
        matrices = 3 if self.activation == "swiglu" else 2
        return 2 * (4 * self.width**2 + matrices * self.width * self.mlp) + 4 * keys * self.width


class MLP(nn.Module):
    """W_down act(W_up x)."""

    hidden: int
    features: int
    activation: str
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up = Linear(self.hidden, ("embed", "mlp"), True, self.dtype, name="up")(x)
        return Linear(self.features, ("mlp", "embed"), True, self.dtype, name="down")(ACTIVATIONS[self.activation](up))


class ViTBlock(nn.Module):
    """x += s1 Attn(LN(x)); x += s2 MLP(LN(x))."""

    cfg: ViTBlockConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: Any, rope: Any, query: Span, key: Span
    ) -> tuple[jax.Array, tuple[Any, dict]]:
        c = self.cfg
        with jax.named_scope("attention"):
            h = LayerNorm(c.norm_eps, name="norm1")(x_BTD)
            h, cache = Attention(c, name="attention")(h, rope, query, key, cache)
            x_BTD = x_BTD + self._scaled("scale1", h)
        with jax.named_scope("mlp"):
            mlp = mlp_of(c.activation, c.mlp, c.width, c.dtype, "mlp")
            x_BTD = x_BTD + self._scaled("scale2", mlp(LayerNorm(c.norm_eps, name="norm2")(x_BTD)))
        return constrain(x_BTD, "batch", "length", "activation"), (cache, {})

    def _scaled(self, name: str, branch: jax.Array) -> jax.Array:
        if not self.cfg.layer_scale:
            return branch
        return branch * param(self, name, ones, (self.cfg.width,), ("norm",)).astype(branch.dtype)


def mlp_of(activation: str, hidden: int, features: int, dtype: str, name: str) -> nn.Module:
    """The MLP that `activation` asks for, with biases."""
    if activation == "swiglu":
        return SwiGLU(hidden, features, True, None, dtype, name=name)
    return MLP(hidden, features, activation, dtype, name=name)
