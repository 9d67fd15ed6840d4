"""Linear attention by the gated delta rule (Kimi Delta Attention) as a module: projections, short convolutions, gates.

What it keeps of a text does not grow with it: a state a head, and the last inputs of the convolutions. Positions are
told by order alone. Source: transformers `glm5_next/modeling_glm5_next.py` (Glm5NextTextLinearAttention).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels import entries
from glmv_jax.kernels.delta_rule import CHUNK, delta_rule
from glmv_jax.kernels.span import Span
from glmv_jax.models.layers import Linear, fan_in, ones, param, zeros

_UNIT_EPS = 1e-6


def _slow(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Biases of softplus that make 0.001 to 0.1 of it, even in the logarithm: at first channels forget within some ten
    to a thousand positions. At zero a text would be forgotten at once, and with it every gradient through the state."""
    rate = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1)))
    return rate + jnp.log(-jnp.expm1(-rate))


def _rates(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Logarithms of 1 to 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """The numbers of one layer. taps: of the convolutions. floor: the least logarithm of what a position lets a channel
    keep; None: there is none."""

    width: int
    heads: int
    head_dim: int
    taps: int = 4
    floor: float | None = -5.0
    norm_eps: float = 1e-5
    dtype: str = "float32"

    def empty_cache(self, depth: int, batch: int) -> dict[str, jax.Array]:
        """Zeros for `depth` layers and `batch` rows: states, and the last inputs of the convolutions of q, k and v."""
        inputs = jnp.zeros((depth, batch, self.taps - 1, self.heads * self.head_dim), self.dtype)
        state = jnp.zeros((depth, batch, self.heads, self.head_dim, self.head_dim), jnp.float32)
        return {"state": state, **dict.fromkeys("qkv", inputs)}

    def flops(self) -> float:
        """Multiply-adds x 2 of one token through the forward pass."""
        M, K = self.heads * self.head_dim, self.head_dim
        matrices = 4 * self.width * M + 2 * K * (self.width + M) + self.width * self.heads
        rule = self.heads * K * (3 * K + 4 * CHUNK)
        return 2 * (matrices + 3 * self.taps * M + rule)


class DeltaAttention(nn.Module):
    cfg: DeltaConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cache: dict | None, query: Span) -> tuple[jax.Array, dict | None]:
        """([B, T, D], the cache with these positions in it). With a cache those that query.valid leaves out, which come
        last in a row, change neither."""
        c = self.cfg
        B, T, _ = x_BTD.shape
        heads = lambda x: x.reshape(B, T, c.heads, c.head_dim)  # noqa: E731

        def narrow(name: str) -> jax.Array:
            """Through a bottleneck as wide as one head."""
            inner = Linear(c.head_dim, ("embed", "latent"), False, c.dtype, name=f"{name}_a")(x_BTD)
            outer = Linear(c.heads * c.head_dim, ("from_latent", "heads"), False, c.dtype, name=f"{name}_b")
            return heads(outer(inner))

        kept, qkv = {}, {}
        for name in "qkv":
            inputs = Linear(c.heads * c.head_dim, ("embed", "heads"), False, c.dtype, name=name)(x_BTD)
            taps = param(self, f"{name}_conv", fan_in, (c.taps, c.heads * c.head_dim), (None, "heads"))
            before = None if cache is None else entries.read(cache[name])
            segments = query.segments if cache is None else None
            qkv[name], kept[name] = convolved(inputs, taps, segments, before, query.valid)
        q, k, v = (heads(x) for x in qkv.values())
        g = self.decay(narrow("f"))
        beta = jax.nn.sigmoid(Linear(c.heads, ("embed", None), False, c.dtype, name="b")(x_BTD).astype(jnp.float32))
        if cache is not None and query.valid is not None:
            g, beta = (jnp.where(query.valid.reshape(B, T, *[1] * (x.ndim - 2)), x, 0) for x in (g, beta))
        out, kept["state"] = delta_rule(
            unit(q) * c.head_dim**-0.5, unit(k), v, g, beta,
            query.segments if cache is None else None, None if cache is None else entries.read(cache["state"]),
        )  # fmt: skip
        if cache is not None:
            kept = {name: entries.put(cache[name], x) for name, x in kept.items()}
        out = self.gated(out, narrow("g")).astype(c.dtype).reshape(B, T, -1)
        return Linear(c.width, ("from_heads", None), False, c.dtype, name="o")(out), None if cache is None else kept

    def decay(self, x_BTHK: jax.Array) -> jax.Array:
        """Logarithms of what each channel keeps, float32."""
        c = self.cfg
        bias = param(self, "dt_bias", _slow, (c.heads * c.head_dim,), ("heads",)).reshape(c.heads, c.head_dim)
        log_H = param(self, "log_gain", _rates if c.floor is None else zeros, (c.heads,), (None,))
        rate = jnp.exp(log_H.astype(jnp.float32))[:, None]
        x_BTHK = x_BTHK.astype(jnp.float32) + bias
        return -rate * jax.nn.softplus(x_BTHK) if c.floor is None else c.floor * jax.nn.sigmoid(rate * x_BTHK)

    def gated(self, x_BTHK: jax.Array, gate_BTHK: jax.Array) -> jax.Array:
        """RMSNorm by head, then the gate, float32."""
        gain_K = param(self, "scale", ones, (self.cfg.head_dim,), ("head_dim",))
        unit = x_BTHK * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTHK), axis=-1, keepdims=True) + self.cfg.norm_eps)
        return gain_K * unit * jax.nn.sigmoid(gate_BTHK.astype(jnp.float32))


def unit(x_BTHK: jax.Array) -> jax.Array:
    """Vectors of length 1, float32."""
    x = x_BTHK.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + _UNIT_EPS)


def convolved(
    x_BTM: jax.Array, taps_WM: jax.Array, segments_BT: Any = None, before_BXM: Any = None, valid_BT: Any = None
) -> tuple[jax.Array, jax.Array]:
    """silu of each channel's convolution with its W taps, the last of which is for the position itself, in x's dtype;
    and the last W - 1 inputs that count, for the next call.

    segments_BT: none reads another's. before_BXM: the W - 1 inputs before these; None: zeros. valid_BT: which inputs
    count, the first of each row; None: all.
    """
    B, T, M = x_BTM.shape
    W = len(taps_WM)
    before_BXM = jnp.zeros((B, W - 1, M), x_BTM.dtype) if before_BXM is None else before_BXM
    all_BSM = jnp.concatenate([before_BXM, x_BTM.astype(before_BXM.dtype)], axis=1)
    out_BTM = jnp.zeros((B, T, M), jnp.float32)
    for w in range(W):
        read_BTM = all_BSM[:, w : w + T].astype(jnp.float32) * taps_WM[w]
        if segments_BT is not None and w < W - 1:
            back = min(W - 1 - w, T)
            same_BT = jnp.pad(segments_BT[:, back:] == segments_BT[:, :-back], ((0, 0), (back, 0)))
            read_BTM = jnp.where(same_BT[..., None], read_BTM, 0)
        out_BTM += read_BTM
    if valid_BT is None:
        kept_BXM = all_BSM[:, T:]
    else:
        at_BX = valid_BT.sum(-1, keepdims=True) + jnp.arange(W - 1)
        kept_BXM = jnp.take_along_axis(all_BSM, at_BX[..., None], axis=1)
    return jax.nn.silu(out_BTM).astype(x_BTM.dtype), kept_BXM
