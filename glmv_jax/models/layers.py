"""The small parts every tower is made of: Linear, Embedding, RMSNorm, LayerNorm, SwiGLU.

Shape, logical axes and initializer of a parameter stand on one line. Kernels are matrices [I, O] (heads flattened
into one dimension), so that an optimiser can treat the last two dimensions as THE matrix whatever is stacked before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.matmul import by_rows, matmul
from glmv_jax.parallel import axes

fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ones, zeros = nn.initializers.ones, nn.initializers.zeros
normal = nn.initializers.normal


def param(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], names: tuple[str | None, ...]
) -> jax.Array:
    """Declares one float32 parameter with its logical axes (unknown names raise)."""
    boxed: Callable[..., Any] = nn.with_logical_partitioning(init, axes.check(names))
    return module.param(name, boxed, shape, jnp.float32)


class Linear(nn.Module):
    """y = x W (+ b), in `dtype`. `axes` names the two dimensions of W; the bias lives where the second does.

    A program that decodes may give W as "kernel_OI" in its place, see `block.by_rows`.
    """

    features: int
    axes: tuple[str, str | None]
    bias: bool = False
    dtype: str = "float32"
    init: Callable = fan_in

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", "kernel_OI"):
            kernel_OI: jax.Array = self.get_variable("params", "kernel_OI")
            y = by_rows(x.astype(self.dtype), kernel_OI.astype(self.dtype)).astype(self.dtype)
        else:
            kernel_IO = param(self, "kernel", self.init, (x.shape[-1], self.features), self.axes)
            y = matmul(x.astype(self.dtype), kernel_IO.astype(self.dtype), self.axes)
        if self.bias:  # added in float32, so that its gradient, a sum over all rows, is taken there
            name = "norm" if self.axes[1] in ("embed", None) else self.axes[1]
            y = (y.astype(jnp.float32) + param(self, "bias", zeros, (self.features,), (name,))).astype(self.dtype)
        return y


class Embedding(nn.Module):
    """A table of rows; `attend=True` logits are a plain matmul with another table (see decoder.head)."""

    rows: int
    width: int
    axis: str = "vocab"
    std: float = 0.02

    @nn.compact
    def __call__(self) -> jax.Array:
        return param(self, "embedding", normal(self.std), (self.rows, self.width), (self.axis, "embed"))


class RMSNorm(nn.Module):
    """g * (x / rms(x)): statistics in float32, the gain multiplied after the down-cast (as GLM does)."""

    axis: str = "norm"
    eps: float = 1e-5
    init: Callable = ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain = param(self, "scale", self.init, (x.shape[-1],), (self.axis,))
        x32 = x.astype(jnp.float32)
        unit = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        # A product of two bfloat16 numbers is exact in float32, and there the gain's gradient is summed.
        return (gain.astype(x.dtype).astype(jnp.float32) * unit.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """The usual LayerNorm with gain and bias, statistics in float32."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain = param(self, "scale", ones, (x.shape[-1],), ("norm",))
        bias = param(self, "bias", zeros, (x.shape[-1],), ("norm",))
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (unit * gain + bias).astype(x.dtype)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x). `limit` clamps gate to <= limit and up to [-limit, limit] (glm5_next)."""

    hidden: int
    features: int
    bias: bool = False
    limit: float | None = None
    dtype: str = "float32"
    down_init: Callable = fan_in

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Linear(self.hidden, ("embed", "mlp"), self.bias, self.dtype, name="gate")(x)
        up = Linear(self.hidden, ("embed", "mlp"), self.bias, self.dtype, name="up")(x)
        down = Linear(self.features, ("from_mlp", None), self.bias, self.dtype, self.down_init, name="down")
        return down(gated(gate, up, self.limit))


def gated(gate: jax.Array, up: jax.Array, limit: float | None) -> jax.Array:
    """silu(gate) * up, with gate clamped to <= limit and up to [-limit, limit] unless limit is None."""
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up
