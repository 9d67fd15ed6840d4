"""Latent attention with a lightning indexer as a module: projections, norms, rotations, cache.

Source: transformers `glm_moe_dsa/modeling_glm_moe_dsa.py` (GlmMoeDsaAttention, GlmMoeDsaIndexer).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels import entries
from glmv_jax.kernels.latent_attention import Cached, Heads, Index, Latents, Selection, latent_attention
from glmv_jax.kernels.span import Span
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.layers import LayerNorm, Linear, RMSNorm, fan_in, param

_INDEX_EPS = 1e-6  # of the norm of the indexer's keys


class LatentAttention(nn.Module):
    cfg: Any  # GLM5Config, or another with these fields
    indexed: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: dict | None, rope: Any, query: Span, key: Span, selection: Selection | None
    ) -> tuple[jax.Array, dict | None, Selection | None, dict[str, jax.Array]]:
        c = self.cfg
        B, T, _ = x_BTD.shape

        def linear(name: str, n: int, axes: tuple[str, str | None], x: jax.Array) -> jax.Array:
            return Linear(n, axes, False, c.dtype, name=name)(x)

        with jax.named_scope("qkv"):
            q_BTQ = RMSNorm("latent", c.latent_eps, name="q_norm")(linear("q_a", c.q_rank, ("embed", "latent"), x_BTD))
            q_BTM = linear("q_b", c.heads * (c.nope_dim + c.rope_dim), ("from_latent", "heads"), q_BTQ)
            q_BTHK = _rotate(q_BTM.reshape(B, T, c.heads, -1), rope, behind=c.nope_dim)
            q_BTHN, r_BTHR = jnp.split(q_BTHK, [c.nope_dim], axis=-1)
            kv_BTK = linear("kv_a", c.kv_rank + c.rope_dim, ("embed", "latent"), x_BTD)
            c_BTC, r_BTR = jnp.split(kv_BTK, [c.kv_rank], axis=-1)
            new = Latents(RMSNorm("latent", c.latent_eps, name="kv_norm")(c_BTC), _rotate_one(r_BTR, rope))
        uk_CHN = param(self, "uk", fan_in, (c.kv_rank, c.heads * c.nope_dim), ("from_latent", "heads"))
        uv_CHV = param(self, "uv", fan_in, (c.kv_rank, c.heads * c.v_dim), ("from_latent", "heads"))
        up = [w.astype(c.dtype).reshape(c.kv_rank, c.heads, -1) for w in (uk_CHN, uv_CHV)]
        index: Index | None = None
        latents: Latents | Cached = new
        kept: dict[str, Any] = {}
        more: dict[str, Any] = {}
        if cache is not None:
            kept = {"latents": entries.write(cache["latents"], jnp.concatenate(new, axis=-1), query.slots[:, 0])}
            latents = Cached(kept["latents"], c.kv_rank, c.rope_dim)
        if self.indexed:
            fixed_BTD, fixed_BTQ = map(jax.lax.stop_gradient, (x_BTD, q_BTQ))
            index, more = self.index(fixed_BTD, fixed_BTQ, rope, cache, query)
        chosen = c.top_k // c.pool
        sparse = c.attention == "sparse" and (T if cache is None else kept["latents"].shape[1]) // c.pool > chosen
        learns = c.index_loss and self.indexed and cache is None
        looked = latent_attention(
            Heads(q_BTHN, r_BTHR, *up), latents, query, key,
            index if sparse or learns else None, selection, chosen if sparse else 0, learns,
        )  # fmt: skip
        aux = {}
        if learns:
            weight_BT = (query.segments > 0).astype(jnp.float32)
            aux["index_loss"] = (looked.loss * weight_BT).sum() / jnp.maximum(weight_BT.sum(), 1)
        with jax.named_scope("out"):
            out_BTD = linear("o", c.width, ("from_heads", None), looked.out.reshape(B, T, -1))
        return out_BTD, None if cache is None else kept | more, looked.selection, aux

    def index(
        self, x_BTD: jax.Array, q_BTQ: jax.Array, rope: Any, cache: dict | None, query: Span
    ) -> tuple[Index | None, dict]:
        """The index of the keys so far, and what the cache keeps of it."""
        q, w, k_BSK = Indexer(self.cfg, name="indexer")(x_BTD, q_BTQ, rope)
        if cache is None:
            return Index(q, w, k_BSK), {}
        kept = entries.write(cache["index"], k_BSK, query.slots[:, 0])
        return Index(q, w, entries.read(kept)), {"index": kept}


class Indexer(nn.Module):
    """Queries [B, T, J, K] of the compressed queries, their weights [B, T, J] and one key [B, T, K] of the input."""

    cfg: Any  # GLM5Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array, q_BTQ: jax.Array, rope: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.cfg
        B, T, _ = x_BTD.shape
        q = Linear(c.index_heads * c.index_dim, ("from_latent", "index"), False, c.dtype, name="q")(q_BTQ)
        k_BTK = Linear(c.index_dim, ("embed", None), False, c.dtype, name="k")(x_BTD)
        k_BTK = LayerNorm(_INDEX_EPS, name="k_norm")(k_BTK)
        w_BTJ = Linear(c.index_heads, ("embed", "index"), False, "float32", name="weights")(x_BTD)
        q_BTJK = _rotate(q.reshape(B, T, c.index_heads, -1), rope)
        return q_BTJK, w_BTJ, _rotate_one(k_BTK, rope)


def _rotate(x_BTHK: jax.Array, rope: rope_lib.Rope | None, behind: int = 0) -> jax.Array:
    """Rotates the dimensions behind so many, as many as the rope has."""
    if rope is None:
        return x_BTHK
    after = x_BTHK.shape[-1] - behind - rope[0].shape[-1]
    return rope_lib.rotate_pairs(x_BTHK, rope_lib.widened(rope, behind, after))


def _rotate_one(x_BTK: jax.Array, rope: rope_lib.Rope | None) -> jax.Array:
    return _rotate(x_BTK[:, :, None], rope)[:, :, 0]
