"""The GLM-5.3-Flash decoder: three layers in four are linear attention by the gated delta rule, the fourth is latent
attention with an indexer over pooled keys; residual streams around every branch, experts, clamped SwiGLU, no rotation.

Source: transformers `glm5_next/modeling_glm5_next.py` (Glm5NextTextModel). It drops the MTP layer of the checkpoint;
that one is latent attention and experts in a plain residual sum, and reads the streams' mean (vLLM, `glm5next`).
Nothing teaches the indexer here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels import entries
from glmv_jax.kernels import pools as pools_lib
from glmv_jax.kernels.latent_attention import Index, Selection
from glmv_jax.kernels.span import Span
from glmv_jax.models.block import LayerCache
from glmv_jax.models.decoder import Runs
from glmv_jax.models.delta_attention import DeltaAttention, DeltaConfig
from glmv_jax.models.expert_decoder import ExpertDecoderConfig, OfConfig
from glmv_jax.models.hyper_connections import HyperConnection, StreamsConfig, joined
from glmv_jax.models.latent import Indexer, LatentAttention
from glmv_jax.models.layers import Linear, RMSNorm, SwiGLU, param, zeros
from glmv_jax.models.moe import MoE, MoEConfig
from glmv_jax.parallel import context
from glmv_jax.parallel.rules import constrain
from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLM5NextConfig(ExpertDecoderConfig):
    """Defaults are those of transformers, and pools of four keys, as GLM-5.3-Flash has them, without the MTP layer.

    kinds: a letter a layer, "K" for linear attention (KDA), "F" for latent attention with its own indexer, "S" for one
    right behind it that sees what it saw; "": three K and an F in turn.
    pool: keys that the indexer has one key for, of which it chooses top_k / pool. linear_*: of KDA, see `DeltaConfig`.
    swiglu_limit: of every MLP and expert.
    """

    vocab: int = 154880
    depth: int = 45
    width: int = 4096
    heads: int = 64
    kinds: str = ""
    q_rank: int = 1536
    kv_rank: int = 512
    nope_dim: int = 256
    v_dim: int = 256
    index_heads: int = 32
    index_dim: int = 128
    top_k: int = 2048
    pool: int = 4
    linear_heads: int = 64
    linear_dim: int = 128
    linear_taps: int = 4
    linear_floor: float | None = -5.0
    streams: StreamsConfig = StreamsConfig()
    mlp: int = 12288
    dense: int = 3
    expert_mlp: int = 2048
    experts: int = 288
    route_scale: float = 2.5
    swiglu_limit: float | None = 10.0
    rope_dim: ClassVar[int] = 0
    attention: ClassVar[str] = "sparse"
    index_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        letters = self.letters
        if len(letters) != self.depth or set(letters) - set("KFS") or "F" not in letters:
            raise UserError(f"kinds={self.kinds!r} must be {self.depth} letters K, F or S, one a layer, one of them F")
        if any(b == "S" and a == "K" for a, b in zip("K" + letters, letters)):
            raise UserError(f"kinds={self.kinds!r}: an S sees what the layer before it saw, which must be an F or an S")
        if self.top_k % self.pool:
            raise UserError(f"top_k={self.top_k} must be a multiple of pool={self.pool}: whole pools are chosen")

    @property
    def letters(self) -> str:
        return self.kinds or "".join("KKKF"[i % 4] for i in range(self.depth))

    @property
    def latent_eps(self) -> float:
        return self.norm_eps

    @property
    def moe(self) -> MoEConfig:
        return dataclasses.replace(super().moe, limit=self.swiglu_limit)

    @property
    def delta(self) -> DeltaConfig:
        return DeltaConfig(
            self.width, self.linear_heads, self.linear_dim, self.linear_taps, self.linear_floor, self.norm_eps,
            self.dtype,
        )  # fmt: skip

    @property
    def stacks(self) -> list[tuple[Unit, int]]:
        """Runs of equal units: what is scanned, and how often. A unit ends with a latent layer (and those that see what
        it saw); linear layers after the last are a unit each."""
        layers = [(kind, "dense" if i < self.dense else "moe") for i, kind in enumerate(self.letters)]
        units, unit = [], []
        for layer, following in zip(layers, [*(kind for kind, _ in layers[1:]), "K"]):
            unit.append(layer)
            if layer[0] != "K" and following != "S":
                units.append(tuple(unit))
                unit = []
        units += [(layer,) for layer in unit]
        return [(Unit(self, kinds, self.streams), len(list(run))) for kinds, run in itertools.groupby(units)]

    @property
    def block(self) -> Unit:
        """The MTP head's layer."""
        return Unit(self, (("F", "moe"),), None)

    def rope(self, positions_BT3: jax.Array) -> None:
        """Nothing is rotated."""

    def module(self) -> nn.Module:
        return Decoder(self)

    def share_prompts(self, cache: dict, length_B: jax.Array, group: int, length: int) -> tuple[dict, int, jax.Array]:
        """From the cache of B prompts that of `group` continuations of each with `length` more slots, its slots, and
        how many are filled. Prompts are copied: a latent layer has fewer numbers a slot than keys of eight heads, and
        a linear one the same for all lengths."""
        slots = next(cached.shape[2] for name, cached in _leaves(cache["layers"]) if name == "latents")
        more = {"latents": length, "pool": -(-(slots + length) // self.pool) + -slots // self.pool}

        def copied(path: tuple, x: jax.Array) -> jax.Array:
            x = jnp.repeat(x, group, axis=1)
            return jnp.pad(x, [(0, more.get(path[-1].key, 0) if axis == 2 else 0) for axis in range(x.ndim)])

        layers = jax.tree_util.tree_map_with_path(copied, cache["layers"])
        return {"layers": layers}, slots + length, jnp.repeat(length_B, group)


def _leaves(cache: Any) -> Iterator[tuple[str, jax.Array]]:
    return ((path[-1].key, x) for path, x in jax.tree_util.tree_leaves_with_path(cache))


@dataclasses.dataclass(frozen=True)
class Unit(OfConfig):
    """Consecutive layers. layers: (letter of `GLM5NextConfig.kinds`, "dense" or "moe") of each. streams: around their
    branches; None: a plain residual sum."""

    cfg: GLM5NextConfig
    layers: tuple[tuple[str, str], ...]
    streams: StreamsConfig | None

    @property
    def layer(self) -> type[nn.Module]:
        return Layers

    def empty_cache(self, depth: int, batch: int, length: int) -> LayerCache:
        c = self.cfg
        zeros = lambda *shape: jnp.zeros((depth, batch, *shape), c.dtype)  # noqa: E731
        cache: LayerCache = {}
        for j, (kind, _) in enumerate(self.layers):
            if kind == "K":
                cache[f"layer{j}"] = c.delta.empty_cache(depth, batch)
                continue
            cache[f"layer{j}"] = {"latents": zeros(length, entries.width(c.kv_rank + c.rope_dim))}
            if kind == "F":
                pooled, tail = zeros(-(-length // c.pool), c.index_dim), zeros(c.pool, 2 * c.index_dim)
                cache[f"layer{j}"] |= {"pool": pooled, "tail": tail}
        return cache

    def flops(self, keys: float) -> float:
        """Of one token through the forward pass of these layers when `keys` keys are visible."""
        c, total = self.cfg, 0.0
        latent = c.width * (c.q_rank + c.kv_rank) + c.heads * c.v_dim * c.width + c.q_rank * c.heads * c.nope_dim
        latent += c.kv_rank * c.heads * (c.nope_dim + c.v_dim) + min(keys, c.top_k) * c.heads * (c.nope_dim + c.v_dim)
        indexer = c.q_rank * c.index_heads * c.index_dim + c.width * (2 * c.index_dim + c.index_heads)
        indexer += keys / c.pool * c.index_heads * (c.index_dim + 1)
        for kind, mlp in self.layers:
            total += c.delta.flops() if kind == "K" else 2 * latent + (2 * indexer if kind == "F" else 0)
            total += c.moe.flops() if mlp == "moe" else 6 * c.width * c.mlp
            total += 2 * self.streams.flops(c.width) if self.streams else 0
        return total


class Decoder(Runs):
    """As `Runs`, with residual streams between the embedding and the final norm."""

    def layers(self, x_BTD: jax.Array, rope: Any, query: Span, key: Span, cache: dict | None) -> tuple:
        if query.branches is not None:
            raise UserError("linear attention reads a row in order and takes no rows with branches; pack every answer "
                            "with its own prompt")  # fmt: skip
        if context.parts() > 1:
            raise UserError("linear attention carries a state along a row, which is not split over devices; use a mesh "
                            "without the axis context")  # fmt: skip
        B, T, D = x_BTD.shape
        streams = jnp.broadcast_to(x_BTD[:, :, None], (B, T, self.cfg.streams.count, D))
        streams, cache, aux = super().layers(streams, rope, query, key, cache)
        return streams.mean(2), cache, aux


class Layers(nn.Module):
    """The layers of a unit: `stack` repeats it. aux: {"layerJ": {"load", "balance"} of its experts}."""

    unit: Unit

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: LayerCache | None, rope: Any, query: Span, key: Span
    ) -> tuple[jax.Array, tuple[dict | None, dict]]:
        selection, kept, aux = None, {}, {}
        for j, (kind, mlp) in enumerate(self.unit.layers):
            name = f"layer{j}"
            layer = Layer(self.unit.cfg, kind, mlp, self.unit.streams, name=name)
            own = None if cache is None else cache[name]
            x, kept[name], selection, aux[name] = layer(x, own, query, key, selection)
        return x, (None if cache is None else kept, aux)


class Layer(nn.Module):
    """x [B, T, N, D], or [B, T, D] without streams, after attention and after the MLP."""

    cfg: GLM5NextConfig
    kind: str
    mlp: str
    streams: StreamsConfig | None

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: dict | None, query: Span, key: Span, selection: Selection | None
    ) -> tuple[jax.Array, dict | None, Selection | None, dict[str, jax.Array]]:
        c = self.cfg
        aux: dict[str, jax.Array] = {}
        with jax.named_scope("attention"):
            inner_BTD, *ways = self.entered(x, "streams1")
            normed = RMSNorm("norm", c.norm_eps, name="norm1")(inner_BTD)
            if self.kind == "K":
                branch, cache = DeltaAttention(c.delta, name="attention")(normed, cache, query)
                selection = None
            else:
                attention = PooledLatentAttention(c, self.kind == "F", name="attention")
                branch, cache, selection, _ = attention(normed, cache, None, query, key, selection)
            x = joined(x, branch, *ways) if self.streams else x + branch
        with jax.named_scope("mlp"):
            inner_BTD, *ways = self.entered(x, "streams2")
            normed = RMSNorm("norm", c.norm_eps, name="norm2")(inner_BTD)
            if self.mlp == "moe":
                branch, aux = MoE(c.moe, name="moe")(normed, query.segments > 0)
            else:
                branch = SwiGLU(c.mlp, c.width, limit=c.swiglu_limit, dtype=c.dtype, name="mlp")(normed)
            x = joined(x, branch, *ways) if self.streams else x + branch
        return constrain(x, "batch", "length", *[None] * (x.ndim - 3), "activation"), cache, selection, aux

    def entered(self, x: jax.Array, name: str) -> tuple[jax.Array, ...]:
        """What a branch reads, and the ways back for `joined`."""
        return HyperConnection(self.streams, name=name)(x) if self.streams else (x,)


class PooledLatentAttention(LatentAttention):
    """As `LatentAttention`, with one key of the indexer a pool.

    The cache keeps the keys of pools, and of the pool at a row's end, which may not be complete, what they are made of.
    """

    def index(
        self, x_BTD: jax.Array, q_BTQ: jax.Array, rope: Any, cache: dict | None, query: Span
    ) -> tuple[Index | None, dict]:
        c, (B, T, _) = self.cfg, x_BTD.shape
        q, w, k_BTK = Indexer(c, name="indexer")(x_BTD, q_BTQ, rope)
        score_BTK = Linear(c.index_dim, ("embed", None), False, c.dtype, name="pool_score")(x_BTD)
        place_nK = param(self, "pool_place_bias", zeros, (c.pool, c.index_dim), (None, None))
        parts_BTX = jnp.concatenate([k_BTK, score_BTK], axis=-1)
        if cache is not None:
            start_B = jnp.broadcast_to(query.slots[:, 0], (B,))
            counts_B = jnp.full((B,), T) if query.valid is None else query.valid.sum(-1)
            pool, tail = (entries.read(cache[name]) for name in ("pool", "tail"))
            pool, tail = _extended(pool, tail, parts_BTX, place_nK, start_B, counts_B)
            slots = cache["latents"].shape[1]
            kept = {name: entries.put(cache[name], x) for name, x in (("pool", pool), ("tail", tail))}
            return Index(q, w, pool, pools_lib.in_slots(B, slots, c.pool)), kept
        if T // c.pool <= c.top_k // c.pool:  # all are seen
            return None, {}
        pools = pools_lib.in_rows(jnp.broadcast_to(query.segments, (B, T)), c.pool)
        at_BPn = jnp.clip(pools_lib.members(pools), 0, T - 1)
        parts_BPnX = jnp.take_along_axis(parts_BTX, at_BPn.reshape(B, -1, 1), axis=1).reshape(*at_BPn.shape, -1)
        return Index(q, w, _means(parts_BPnX, place_nK), pools), {}


def _means(parts_PnX: jax.Array, place_nK: jax.Array) -> jax.Array:
    key_PnK, score_PnK = jnp.split(parts_PnX, 2, axis=-1)
    return pools_lib.mean(key_PnK, score_PnK.astype(jnp.float32) + place_nK)


def _extended(
    pool_BPK: jax.Array, tail_BnX: jax.Array, new_BTX: jax.Array, place_nK: jax.Array, start_B: jax.Array,
    counts_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The keys of pools, and the parts of the last one, after T new positions a row from slot start on, of which the
    first `counts` count. Pools that are not complete hold what nobody sees, until they are."""
    (B, n, X), T = tail_BnX.shape, new_BTX.shape[1]
    groups = -(-T // n) + 1
    window = jnp.concatenate([tail_BnX, jnp.zeros((B, (groups - 1) * n, X), tail_BnX.dtype)], axis=1)
    put = lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0)  # noqa: E731
    window = jax.vmap(put)(window, new_BTX.astype(window.dtype), start_B % n)
    fresh = _means(window.reshape(B, groups, n, X), place_nK).astype(pool_BPK.dtype)
    at_BG = (start_B // n)[:, None] + jnp.arange(groups)
    pool_BPK = pool_BPK.at[jnp.arange(B)[:, None], at_BG].set(fresh, mode="drop")
    done_B = (start_B % n + counts_B) // n
    tail = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, n, axis=0))(window, done_B * n)
    return pool_BPK, tail
