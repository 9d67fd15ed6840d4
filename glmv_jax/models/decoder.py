"""The dense GLM decoder, as in GLM-OCR's, GLM-4.1V's and GLM-4.6V-Flash's text models: grouped-query attention, rotary
sections, norms on both sides of each branch. Sources: transformers `glm_ocr/modeling_glm_ocr.py` (GlmOcrTextModel),
`glm4v/modeling_glm4v.py` (Glm4vTextModel).

`embed`, `apply` and `logits` serve every decoder: a config has vocab, width, depth, tied, dtype, `block` (of the MTP
head), rope(), module(), flops(), init_cache(), share_prompts() and layers_apart().
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.attention import Shared
from glmv_jax.kernels.matmul import by_rows
from glmv_jax.kernels.span import Span
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.block import BlockConfig, as_prompt, empty_cache, layers_apart, stack
from glmv_jax.models.layers import Embedding, RMSNorm, fan_in, param
from glmv_jax.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Defaults are the released GLM-OCR text model without its MTP layer.

    rope_split: how many of the rotary_dim / 2 frequencies belong to (time, height, width).
    """

    vocab: int = 59392
    depth: int = 16
    width: int = 1536
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 4608
    rope_theta: float = 1e4
    rope_split: tuple[int, int, int] = (16, 24, 24)
    rotary_fraction: float = 1.0
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    tied: bool = False  # the output head is the embedding table
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1  # layers a turn of the loop over them, see `block.stack`

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            self.width, self.heads, self.mlp, self.kv_heads, self.head_dim, qkv_bias=self.qkv_bias,
            post_norms=True, identity=True, norm_eps=self.norm_eps, rotate=rope_lib.rotate_pairs, dtype=self.dtype,
        )  # fmt: skip

    def rope(self, positions_BT3: jax.Array) -> rope_lib.Rope:
        rotary_dim = int(self.head_dim * self.rotary_fraction)
        return rope_lib.sections(positions_BT3, rotary_dim, self.rope_theta, self.rope_split)

    def flops(self, tokens: float, keys: float) -> float:
        """Forward FLOPs of `tokens` tokens, output head included, each seeing `keys` keys on average."""
        return tokens * (self.depth * self.block.flops(keys) + 2 * self.width * self.vocab)

    def init_cache(self, batch: int, length: int) -> dict:
        """Zeros for `batch` rows of `length` slots; "layers" has leaves [L, ...]."""
        return {"layers": empty_cache(self.block, self.depth, batch, length)}

    def share_prompts(self, cache: dict, length_B: jax.Array, group: int, length: int) -> tuple[dict, int, jax.Array]:
        """From the cache of B prompts of these lengths that of `group` continuations of each with `length` more slots,
        its slots, and how many are filled: none, in all rows alike. Prompts are not copied, only read from now on."""
        prompt = shared_prompts(cache["layers"], length_B)
        return self.init_cache(len(length_B) * group, length) | {"prompt": prompt}, length, jnp.zeros(1, jnp.int32)

    def layers_apart(self, params: dict, cache: dict) -> tuple[dict, dict]:
        """Parameters and cache for decoding without a loop over layers, see `block.layers_apart`."""
        return layers_apart(params), {part: _apart(tree, self.depth) for part, tree in cache.items()}

    def module(self) -> nn.Module:
        return Decoder(self)

    def example(self) -> tuple:
        span = Span(jnp.ones((1, 2), jnp.int32), jnp.arange(2)[None])
        return jnp.zeros((1, 2, self.width)), jnp.zeros((1, 2, 3), jnp.int32), span, span, None


class DecoderOutput(NamedTuple):
    """hidden, prenorm: [B, T, D] after and before the final norm; cache: what came in, with this pass added; aux: what
    layers say about themselves, [L, ...] a name (a dense decoder nothing)."""

    hidden: jax.Array
    prenorm: jax.Array
    cache: dict | Any  # None where none was given
    aux: dict[str, jax.Array]


class Decoder(nn.Module):
    """Embedded inputs to hidden states. The table and the head are parameters here, read by `embed` and `logits`."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT3: jax.Array, query: Span, key: Span, cache: dict | None
    ) -> DecoderOutput:
        c = self.cfg
        Embedding(c.vocab, c.width, name="embed")()
        if not c.tied:
            param(self, "head", fan_in, (c.width, c.vocab), ("embed", "vocab"))
        x_BTD = constrain(x_BTD.astype(c.dtype), "batch", "length", "activation")
        x_BTD, cache, aux = self.layers(x_BTD, c.rope(positions_BT3), query, key, cache)
        return DecoderOutput(RMSNorm("norm", c.norm_eps, name="norm")(x_BTD), x_BTD, cache, aux)

    def layers(self, x_BTD: jax.Array, rope: Any, query: Span, key: Span, cache: dict | None) -> tuple:
        """(x after all layers, cache, aux)."""
        c = self.cfg
        own = None if cache is None else with_prompt(cache["layers"], cache.get("prompt"))
        x_BTD, own, aux = stack(
            c.block, c.depth, c.remat, x_BTD, rope, query, key, own, c.unroll, axis="pipeline"
        )
        return x_BTD, None if cache is None else cache | {"layers": own}, aux


class Runs(Decoder):
    """A decoder with layers of several kinds: `cfg.stacks` lists (block, how often) in order, and the parameters of run
    i are "blocks{i}", as are its part of the cache and of aux."""

    cfg: Any

    def layers(self, x_BTD: jax.Array, rope: Any, query: Span, key: Span, cache: dict | None) -> tuple:
        kept, aux = {}, {}
        longest = max(times for _, times in self.cfg.stacks)  # the others are not many; they stay outside of a pipeline
        for i, (block, times) in enumerate(self.cfg.stacks):
            name = f"blocks{i}"
            own = None
            if cache is not None:
                own = with_prompt(cache["layers"][name], cache["prompt"][name] if "prompt" in cache else None)
            x_BTD, kept[name], aux[name] = stack(
                block, times, self.cfg.remat, x_BTD, rope, query, key, own, self.cfg.unroll, name=name,
                axis="pipeline" if times == longest else "layers",
            )  # fmt: skip
        return x_BTD, None if cache is None else cache | {"layers": kept}, aux


def runs_apart(stacks: Sequence[tuple[Any, int]], params: dict, cache: dict) -> tuple[dict, dict]:
    """As `DecoderConfig.layers_apart`, of a decoder of `Runs`."""
    times = {f"blocks{i}": n for i, (_, n) in enumerate(stacks)}
    for name in times:
        params = layers_apart(params, name)
    return params, {part: {name: _apart(runs[name], n) for name, n in times.items()} for part, runs in cache.items()}


def _apart(tree: Any, depth: int) -> tuple:
    return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(depth))


def with_prompt(layers: Any, prompt: Any) -> Any:
    """The cache of layers, stacked or a tuple, and what they only read of the prompts they continue, if anything."""
    if prompt is None:
        return layers
    if isinstance(layers, tuple):
        return tuple(own | {"prompt": x} for own, x in zip(layers, prompt))
    return layers | {"prompt": prompt}


def shared_prompts(layers: dict, length_B: jax.Array) -> Shared:
    """From the keys and values of prompts of these lengths, stacked by layer, what their continuations read."""
    L, _, slots, _ = layers["k"].shape
    return as_prompt(layers, jnp.broadcast_to(jnp.arange(slots) < length_B[:, None], (L, len(length_B), slots)))


@jax.named_scope("embed")
def embed(params: dict, tokens_BT: jax.Array) -> jax.Array:
    """Rows of the embedding table [B, T, D], float32."""
    return jnp.take(params["embed"]["embedding"], tokens_BT, axis=0)


def apply(
    cfg: Any, params: dict, x_BTD: jax.Array, positions_BT3: jax.Array, query: Span, key: Span,
    cache: dict | None = None,
) -> DecoderOutput:  # fmt: skip
    """Embedded inputs [B, T, D] through the decoder of this config."""
    return cfg.module().apply({"params": params}, x_BTD, positions_BT3, query, key, cache)


def head(cfg: Any, params: dict) -> jax.Array:
    """The output head [D, V], float32."""
    return params["embed"]["embedding"].T if cfg.tied else params["head"]


@jax.named_scope("head")
def logits(cfg: Any, params: dict, hidden_BTD: jax.Array) -> jax.Array:
    """[B, T, V] float32 from hidden states after a norm (the final one, or the MTP head's own)."""
    if "head_VD" in params:  # see `vlm.layers_apart`
        return by_rows(hidden_BTD, params["head_VD"].astype(cfg.dtype))
    head_DV = head(cfg, params).astype(cfg.dtype)
    return jnp.einsum("btd,dv->btv", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
