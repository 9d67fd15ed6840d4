"""Residual streams in place of one residual sum (manifold-constrained hyper-connections, arXiv 2512.24880).

A token has N streams x_n. A branch reads a weighed sum of them, and what it returns is added to each, after they have
been mixed:

    y = f(sum_n a_n x_n),    x_n <- b_n y + sum_m C_mn x_m

a, b and C come out of the streams themselves, by one matrix; C is made doubly stochastic (Sinkhorn and Knopp), so that
mixing keeps the streams' size through any number of layers. Source: transformers `glm5_next/modeling_glm5_next.py`
(Glm5NextTextHyperConnection).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.models.layers import normal, ones, param, zeros


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
    """count: N. sinkhorn: how often C's rows and columns are divided by their sums. eps: beside those sums."""

    count: int = 4
    sinkhorn: int = 20
    eps: float = 1e-6
    norm_eps: float = 1e-5

    def flops(self, width: int) -> float:
        """Multiply-adds x 2 of one token around one branch."""
        N = self.count
        return 2 * width * N * (N * (N + 2) + N + 2)


class HyperConnection(nn.Module):
    cfg: StreamsConfig

    @nn.compact
    def __call__(self, x_BTND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(what the branch reads [B, T, D], b [B, T, N], C [B, T, N, N]); `joined` takes b and C. What
        weighs is float32."""
        c, (B, T, N, D) = self.cfg, x_BTND.shape
        mix = param(self, "mix", normal(0.02), (N * D, N * (N + 2)), ("embed", None))
        bias = param(self, "mix_bias", zeros, (N * (N + 2),), (None,))
        scale = param(self, "mix_scale", ones, (3,), (None,))
        flat = x_BTND.astype(jnp.float32).reshape(B, T, N * D)
        flat = flat * jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + c.norm_eps)
        cuts = [N, 2 * N]
        read, write, mixed = (
            x * s + b for x, s, b in zip(jnp.split(jnp.matmul(flat, mix), cuts, axis=-1), scale, jnp.split(bias, cuts))
        )
        a_BTN = jax.nn.sigmoid(read) + c.eps
        inner_BTD = jnp.einsum("btn,btnd->btd", a_BTN, x_BTND, preferred_element_type=jnp.float32)
        return inner_BTD.astype(x_BTND.dtype), 2 * jax.nn.sigmoid(write), self.balanced(mixed.reshape(B, T, N, N))

    def balanced(self, mixed_BTNN: jax.Array) -> jax.Array:
        """Rows and columns sum to 1."""
        c = self.cfg
        over = lambda x, axis: x / (x.sum(axis, keepdims=True) + c.eps)  # noqa: E731
        first = over(jax.nn.softmax(mixed_BTNN, axis=-1) + c.eps, -2)
        return jax.lax.fori_loop(0, c.sinkhorn - 1, lambda _, x: over(over(x, -1), -2), first)


def joined(x_BTND: jax.Array, branch_BTD: jax.Array, b_BTN: jax.Array, mix_BTNN: jax.Array) -> jax.Array:
    """The streams after a branch."""
    dtype = x_BTND.dtype
    kept_BTND = jnp.einsum("btmn,btmd->btnd", mix_BTNN.astype(dtype), x_BTND)
    return kept_BTND + b_BTN.astype(dtype)[..., None] * branch_BTD[:, :, None]
