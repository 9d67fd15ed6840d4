"""The GLM-5 decoder: latent attention with a lightning indexer (DSA), three dense layers and then mixtures of experts.

Source: transformers `glm_moe_dsa/modeling_glm_moe_dsa.py` (GlmMoeDsaModel); DeepSeek-V3.2 for the indexer's loss.
Rotation is by (time, height, width) sections as in the GLM vision-language models; for text, where the three are
equal, that is GLM-5's own whatever the split. The report does not say how GLM-5V rotates at images: the split is ours.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from glmv_jax.kernels import entries
from glmv_jax.kernels.latent_attention import Selection
from glmv_jax.kernels.span import Span
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.block import LayerCache
from glmv_jax.models.expert_decoder import ExpertDecoderConfig, OfConfig
from glmv_jax.models.latent import LatentAttention
from glmv_jax.models.layers import RMSNorm, SwiGLU
from glmv_jax.models.moe import MoE
from glmv_jax.parallel.remat import ATTENTION
from glmv_jax.parallel.rules import constrain
from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLM5Config(ExpertDecoderConfig):
    """Defaults are the released GLM-5 (743 B) without its MTP layer.

    index: a letter a layer, "F" for a layer with its own indexer and "S" for one that sees what the last F saw; ""
    stands for F everywhere.
    attention: "sparse" (top_k keys a query), or "dense" (all visible keys; the warm-up of an indexer).
    index_loss: whether the indexer's loss is computed, over the keys seen; nothing else teaches it.
    """

    vocab: int = 154880
    depth: int = 78
    width: int = 6144
    heads: int = 64
    q_rank: int = 2048
    kv_rank: int = 512
    nope_dim: int = 192
    rope_dim: int = 64
    v_dim: int = 256
    index_heads: int = 32
    index_dim: int = 128
    top_k: int = 2048
    index: str = ""
    attention: str = "sparse"
    index_loss: bool = False
    mlp: int = 12288
    dense: int = 3
    expert_mlp: int = 2048
    experts: int = 256
    route_scale: float = 2.5
    rope_theta: float = 1e6
    latent_eps: ClassVar[float] = 1e-6  # of the norms of latents, whatever those around have
    pool: ClassVar[int] = 1  # keys that the indexer has one key for

    def __post_init__(self) -> None:
        if self.index and (len(self.index) != self.depth or set(self.index) - set("FS") or self.index[0] != "F"):
            raise UserError(f"index={self.index!r} must be {self.depth} letters F or S, one a layer, F first")
        if self.attention not in ("sparse", "dense"):
            raise UserError(f"attention={self.attention!r} is not known; choose sparse or dense")
        if sum(self.rope_split) * 2 != self.rope_dim:
            raise UserError(f"rope_split={self.rope_split} must sum to half of rope_dim={self.rope_dim}")

    @property
    def stacks(self) -> list[tuple[Unit, int]]:
        """Runs of equal units: what is scanned, and how often. A unit is a layer F with the S that follow it."""
        kinds = [("dense" if i < self.dense else "moe") for i in range(self.depth)]
        starts = [i for i, letter in enumerate(self.index or "F" * self.depth) if letter == "F"]
        units = [tuple(kinds[a:b]) for a, b in zip(starts, [*starts[1:], self.depth])]
        return [(Unit(self, kinds), len(list(run))) for kinds, run in itertools.groupby(units)]

    @property
    def block(self) -> Unit:
        """One layer with its own indexer and experts: the MTP head's."""
        return Unit(self, ("moe",))

    def rope(self, positions_BT3: jax.Array) -> rope_lib.Rope:
        return rope_lib.sections(positions_BT3, self.rope_dim, self.rope_theta, self.rope_split)

    def share_prompts(self, cache: dict, length_B: jax.Array, group: int, length: int) -> tuple[dict, int, jax.Array]:
        """From the cache of B prompts that of `group` continuations of each with `length` more slots, its slots, and
        how many are filled. Prompts are copied: a slot is 704 numbers, where eight heads of 128 would keep 2,048."""
        layers = jax.tree.map(lambda x: _copied(x, 1, group, length), cache["layers"])
        return {"layers": layers}, jax.tree.leaves(layers)[0].shape[2], jnp.repeat(length_B, group)


@dataclasses.dataclass(frozen=True)
class Unit(OfConfig):
    """Consecutive layers of which the first has an indexer and the others see what it selects. mlps: "dense" or "moe"
    for each."""

    cfg: GLM5Config
    mlps: tuple[str, ...]

    @property
    def layer(self) -> type[nn.Module]:
        return Layers

    def empty_cache(self, depth: int, batch: int, length: int) -> LayerCache:
        c = self.cfg
        zeros = lambda n: jnp.zeros((depth, batch, length, n), c.dtype)  # noqa: E731
        cache = {f"layer{j}": {"latents": zeros(entries.width(c.kv_rank + c.rope_dim))} for j in range(len(self.mlps))}
        cache["layer0"]["index"] = zeros(c.index_dim)
        return cache

    def flops(self, keys: float) -> float:
        """Of one token through the forward pass of these layers when `keys` keys are visible."""
        c = self.cfg
        projections = c.width * (c.q_rank + c.kv_rank + c.rope_dim) + c.heads * c.v_dim * c.width
        projections += c.q_rank * c.heads * (c.nope_dim + c.rope_dim) + c.kv_rank * c.heads * (c.nope_dim + c.v_dim)
        seen = min(keys, c.top_k) if c.attention == "sparse" else keys
        attention = 2 * projections + 2 * seen * c.heads * (c.nope_dim + c.rope_dim + c.v_dim)
        indexer = 2 * (c.q_rank * c.index_heads * c.index_dim + c.width * (c.index_dim + c.index_heads))
        indexer += 2 * keys * c.index_heads * (c.index_dim + 1)
        mlps = sum(c.moe.flops() if kind == "moe" else 6 * c.width * c.mlp for kind in self.mlps)
        return len(self.mlps) * attention + indexer + mlps


def _copied(x: jax.Array, rows: int, group: int, length: int) -> jax.Array:
    """`group` copies of each row (axis `rows`, slots behind it), with `length` more slots."""
    return jnp.pad(jnp.repeat(x, group, axis=rows), [(0, length if axis == rows + 1 else 0) for axis in range(x.ndim)])


class Layers(nn.Module):
    """The layers of a unit: `stack` repeats it. aux: {"layerJ": {"load", "balance"} of its experts, "index_loss"}."""

    unit: Unit

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: LayerCache | None, rope: Any, query: Span, key: Span
    ) -> tuple[jax.Array, tuple[dict | None, dict]]:
        selection, kept, aux = None, {}, {}
        for j, mlp in enumerate(self.unit.mlps):
            name = f"layer{j}"
            layer = Layer(self.unit.cfg, mlp, indexed=j == 0, name=name)
            own = None if cache is None else cache[name]
            x_BTD, kept[name], selection, aux[name] = layer(x_BTD, own, rope, query, key, selection)
        return x_BTD, (None if cache is None else kept, aux)


class Layer(nn.Module):
    """x += Attn(norm(x)); x += MLP(norm(x))."""

    cfg: GLM5Config
    mlp: str
    indexed: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: dict | None, rope: Any, query: Span, key: Span, selection: Selection | None
    ) -> tuple[jax.Array, dict | None, Selection | None, dict[str, jax.Array]]:
        c = self.cfg
        with jax.named_scope("attention"):
            normed = RMSNorm("norm", c.norm_eps, name="norm1")(x_BTD)
            branch, cache, selection, aux = LatentAttention(c, self.indexed, name="attention")(
                normed, cache, rope, query, key, selection
            )
            x_BTD = checkpoint_name(x_BTD + branch, ATTENTION)
        with jax.named_scope("mlp"):
            normed = RMSNorm("norm", c.norm_eps, name="norm2")(x_BTD)
            if self.mlp == "moe":
                branch, said = MoE(c.moe, name="moe")(normed, query.segments > 0)
                aux = aux | said
            else:
                branch = SwiGLU(c.mlp, c.width, dtype=c.dtype, name="mlp")(normed)
        return constrain(x_BTD + branch, "batch", "length", "activation"), cache, selection, aux
