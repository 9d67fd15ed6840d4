"""One transformer block and one `stack()` for every tower: CogViT, the text tower, the GLM decoder, the MTP head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from glmv_jax.kernels import entries
from glmv_jax.kernels.attention import Shared, attention, cached
from glmv_jax.kernels.span import Span
from glmv_jax.models import rope as rope_lib
from glmv_jax.models.api import applied
from glmv_jax.models.layers import Linear, RMSNorm, SwiGLU, fan_in, normal, ones, param, zeros
from glmv_jax.parallel import caches, context, micro, pipeline, rules
from glmv_jax.parallel.remat import named, policy
from glmv_jax.parallel.rules import constrain
from glmv_jax.typing import Params, UserError

# What one layer keeps while decoding, here k and v [B * G, S, K], which it adds to and returns (`entries.Kept`), and
# where rows continue the same prompts "prompt", a kernels.attention.Shared, which it only reads. The stack holds all of
# them with a leading L, or as a tuple of L.
LayerCache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The numbers of one block. `rotate` is the rotation of rope.py that pairs this tower's dimensions."""

    width: int
    heads: int
    mlp: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    bias: bool = False  # of all matrices
    qkv_bias: bool = False  # of these three alone
    qk_norm: bool = False
    post_norms: bool = False  # a norm after attention and after the MLP too, before the residual sum (GLM decoders)
    identity: bool = False  # starts as the identity: the last matrix of a branch, or the norm after it, at zero
    norm_eps: float = 1e-5
    swiglu_limit: float | None = None
    rotate: Callable = rope_lib.rotate_half
    dtype: str = "float32"
    chunk: int = 0  # positions of a device that pass the MLP at a time, forward and backward; 0: all

    @property
    def k(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def g(self) -> int:
        return self.kv_heads or self.heads

    @property
    def biases(self) -> str:
        """Which projections of the attention have one."""
        return "qkvo" if self.bias else "qkv" if self.qkv_bias else ""

    @property
    def layer(self) -> type[nn.Module]:
        """The module that `stack` repeats."""
        return Block

    @property
    def out_init(self) -> Callable:
        return zeros if self.identity and not self.post_norms else fan_in

    @property
    def gain_init(self) -> Callable:
        return zeros if self.identity else ones

    def empty_cache(self, depth: int, batch: int, length: int) -> LayerCache:
        """Zeros for `depth` layers, `batch` rows and `length` slots."""
        return empty_cache(self, depth, batch, length)

    def flops(self, keys: float) -> float:
        """Multiply-adds x 2 of one token through the forward pass when it sees `keys` keys."""
        matrices = self.width * self.k * (2 * self.heads + 2 * self.g) + 3 * self.width * self.mlp
        return 2 * matrices + 4 * keys * self.heads * self.k


class Attention(nn.Module):
    cfg: Any  # BlockConfig, or another with these fields

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rope: Any, query: Span, key: Span, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.cfg
        B, T, _ = x_BTD.shape

        def project(name: str, n: int, axis: str) -> jax.Array:
            return Linear(n * c.k, ("embed", axis), name in c.biases, c.dtype, name=name)(x_BTD).reshape(B, T, n, c.k)

        with jax.named_scope("qkv"):
            q_BTHK = project("q", c.heads, "heads")
            k_BTGK, v_BTGK = project("k", c.g, "kv_heads"), project("v", c.g, "kv_heads")
            if c.qk_norm:
                q_BTHK = RMSNorm("head_dim", c.norm_eps, name="q_norm")(q_BTHK)
                k_BTGK = RMSNorm("head_dim", c.norm_eps, name="k_norm")(k_BTGK)
            q_BTHK, k_BTGK = c.rotate(q_BTHK, rope), c.rotate(k_BTGK, rope)
        with jax.named_scope("core"):
            if cache is not None:
                shared = cache.get("prompt")
                cache = {"k": write(cache["k"], k_BTGK, query.slots), "v": write(cache["v"], v_BTGK, query.slots)}
            if cache is None or query.in_order is not None:  # a row sees itself
                out_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, query, key)
            else:
                out_BTHK = cached(q_BTHK, entries.read(cache["k"]), entries.read(cache["v"]), query, key, shared)
        with jax.named_scope("out"):
            out = Linear(c.width, ("from_heads", None), "o" in c.biases, c.dtype, c.out_init, name="o")
            return out(out_BTHK.reshape(B, T, -1)), cache


@jax.named_scope("attention")
def probed(module: nn.Module, x_BTD: jax.Array, key: Span, heads: int, dtype: str) -> jax.Array:
    """[B, D]: what one learned query finds in each row's segment 1. Parameters "probe", "q", "k", "v", "o" of `module`;
    call it inside a compact one."""
    B, T, D = x_BTD.shape
    probe_D = param(module, "probe", normal(D**-0.5), (D,), ("norm",))

    def linear(name: str, x: jax.Array, axes: tuple[str, str | None] = ("embed", "heads")) -> jax.Array:
        return Linear(D, axes, True, dtype, name=name)(x)

    q = linear("q", jnp.broadcast_to(probe_D.astype(dtype), (B, 1, D))).reshape(B, 1, heads, -1)
    k, v = (linear(name, x_BTD).reshape(B, T, heads, -1) for name in ("k", "v"))
    out_BD = attention(q, k, v, Span(jnp.ones((B, 1), jnp.int32)), key).reshape(B, D)
    return linear("o", out_BD, ("from_heads", None))


class Block(nn.Module):
    """x += Attn(norm(x)); x += SwiGLU(norm(x)), with optional norms on the two branches' outputs.

    With `identity` both branches start at zero (Goyal et al., arXiv 1706.02677, section 5.1), so that the words a tower
    reads are not drowned in random mixtures of them before anything is learnt.
    """

    cfg: BlockConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: LayerCache | None, rope: Any, query: Span, key: Span
    ) -> tuple[jax.Array, tuple[LayerCache | None, dict[str, jax.Array]]]:
        c = self.cfg
        norm = lambda name, init=ones: RMSNorm("norm", c.norm_eps, init, name=name)  # noqa: E731
        with jax.named_scope("attention"):
            branch, cache = Attention(c, name="attention")(norm("norm1")(x_BTD), rope, query, key, cache)
            x_BTD = x_BTD + (norm("post_norm1", c.gain_init)(branch) if c.post_norms else branch)
        with jax.named_scope("mlp"):
            branch, aux = self.mlp(norm("norm2")(x_BTD), query)
            x_BTD = x_BTD + (norm("post_norm2", c.gain_init)(branch) if c.post_norms else branch)
        return constrain(x_BTD, "batch", "length", "activation"), (cache, aux)

    def mlp(self, x_BTD: jax.Array, query: Span) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The second branch, and what it says about itself."""
        c = self.cfg
        mlp = functools.partial(SwiGLU, c.mlp, c.width, c.bias, c.swiglu_limit, c.dtype, c.out_init)
        if not c.chunk or self.is_initializing():
            return mlp(name="mlp")(x_BTD), {}
        own = self.variables["params"]["mlp"]
        return micro.in_chunks(lambda x: applied(mlp(parent=None), own, x), x_BTD, c.chunk), {}


def stack(
    cfg: Any, depth: int, remat: str, x_BTD: jax.Array, rope: Any, query: Span, key: Span, cache: Any = None,
    unroll: int = 1, name: str = "blocks", axis: str = "layers",
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """`depth` blocks of `cfg.layer` as one scan, parameters stacked on a leading axis `axis` under `name`.

    Call it inside a compact module. cache: `LayerCache` with a leading L, or None; or a tuple of L of them, and then
    blocks follow each other without a loop and their parameters are those of `layers_apart`. unroll: blocks a turn of
    the scan's loop. axis: "pipeline" for layers that live on the stages of a mesh, if it has some. Returns the result,
    the updated cache, and what blocks say about themselves (losses, loads of experts), with a leading L too; blocks of
    `BlockConfig` say nothing.

    Raises: as `parallel.pipeline.plan`.
    """
    block = cfg.layer
    over_layers: dict[str, Any] = dict(
        variable_axes={"params": 0}, split_rngs={"params": True}, out_axes=0, length=depth, unroll=unroll,
        metadata_params={nn.PARTITION_NAME: axis},
    )  # fmt: skip
    beside = (rope, query, key)
    if isinstance(cache, tuple):
        caches, said = [], []
        for layer, own in enumerate(cache):
            x_BTD, (own, aux) = block(cfg, name=f"{name}_{layer}")(x_BTD, own, *beside)
            caches.append(own)
            said.append(aux)
        return x_BTD, tuple(caches), jax.tree.map(lambda *xs: jnp.stack(xs), *said)
    if cache is not None:  # nothing learns there
        if axis == pipeline.LAYERS and pipeline.plan(len(x_BTD), depth) is not None:
            raise UserError("rows are not decoded through a pipeline; use a mesh without the axis stage")
        prompt = {name: cache[name] for name in ("prompt",) if name in cache}
        stacks = {name: x for name, x in cache.items() if name not in prompt}
        scanned = nn.scan(_in_place(block), in_axes=(0, *[nn.broadcast] * 3), **over_layers)(cfg, name=name)
        (x_BTD, stacks, _), aux = scanned((x_BTD, stacks, jnp.int32(0)), prompt, *beside)
        return x_BTD, stacks, aux
    if remat == "offload":
        block = _named(block)
    if remat != "none":
        block = nn.remat(block, policy=policy(remat), prevent_cse=False)
    scanned = nn.scan(block, in_axes=nn.broadcast, **over_layers)(cfg, name=name)
    plan = pipeline.plan(len(x_BTD), depth) if axis == pipeline.LAYERS and not scanned.is_initializing() else None
    if plan is None:
        x_BTD, (_, aux) = scanned(x_BTD, None, *beside)
        return x_BTD, None, aux
    x_BTD, aux = _staged(plan, cfg, remat, scanned.variables["params"], x_BTD, beside, unroll)
    return x_BTD, None, aux


def _staged(
    plan: pipeline.Schedule, cfg: Any, remat: str, params: Any, x_BTD: jax.Array, beside: tuple, unroll: int
) -> tuple:
    """As `stack`, each layer on its stage."""

    def layer(params: Params, x: jax.Array, beside: tuple) -> tuple:
        x = named(x) if remat == "offload" else x
        x, (_, aux) = applied(cfg.layer(cfg, parent=None), params, x, None, *beside)
        return x, (aux, (beside[1].segments > 0).sum().astype(jnp.float32))

    if remat != "none":
        layer = jax.checkpoint(layer, policy=policy(remat), prevent_cse=False)
    return pipeline.run(plan, layer, params, x_BTD, beside, _of_batch, unroll)


def _named(layer: Any) -> type[nn.Module]:
    """The layer, reading its input by the name that a policy knows (`parallel.remat`)."""

    class Named(layer):
        def __call__(self, x_BTD: jax.Array, *rest: Any) -> Any:
            return super().__call__(named(x_BTD), *rest)

    return Named


def _in_place(layer: Any) -> type[nn.Module]:
    """The layer with its part of what all layers keep, which goes from layer to layer as it is (`entries`)."""

    class InPlace(layer):
        def __call__(self, carry: tuple, prompt: dict, *rest: Any) -> tuple:
            x_BTD, stacks, number = carry
            own = jax.tree.map(lambda stack: entries.Place(stack, number), stacks)
            x_BTD, (own, aux) = super().__call__(x_BTD, own | prompt, *rest)
            stacks = jax.tree.map(lambda place: place.stack, own, is_leaf=lambda x: isinstance(x, entries.Place))
            return (x_BTD, stacks, number + 1), aux

    return InPlace


def _of_batch(said: tuple[dict, jax.Array]) -> dict:
    """From what M microbatches say, [M, ...], and their tokens: those that chose an expert are counted; of means over
    tokens and of means over rows there is the mean over the batch's."""
    aux, tokens_M = said

    def of(path: tuple, x: jax.Array) -> jax.Array:
        if path[-1].key == "load":
            return x.sum(0)
        over_tokens = path[-1].key == "index_loss"
        return (x * tokens_M).sum(0) / jnp.maximum(tokens_M.sum(0), 1) if over_tokens else x.mean(0)

    return jax.tree_util.tree_map_with_path(of, aux)


def layers_apart(params: dict, name: str = "blocks") -> dict:
    """The parameters of a module that calls `stack`, with those of each layer for themselves: `blocks_0`, ...

    Out of a stack XLA's CPU backend copies a layer's matrices at each use, three times the traffic of a product with
    one vector; here they are copied once.
    """
    leaves, tree = jax.tree.flatten(params[name])
    rest = {other: x for other, x in params.items() if other != name}
    return rest | {f"{name}_{i}": jax.tree.unflatten(tree, [x[i] for x in leaves]) for i in range(len(leaves[0]))}


LARGE = 1 << 21  # numbers of a matrix that no cache holds


def by_rows(params: dict) -> dict:
    """Parameters with the large matrices of `Linear` laid out [O, I], as "kernel_OI"; see `kernels.matmul.by_rows`."""
    found: dict[str, Any] = {}
    for name, x in params.items():
        if isinstance(x, dict):
            found[name] = by_rows(x)
        elif name == "kernel" and x.ndim == 2 and x.size >= LARGE:
            found["kernel_OI"] = x.T
        else:
            found[name] = x
    return found


def empty_cache(cfg: BlockConfig, depth: int, batch: int, length: int) -> LayerCache:
    """Zeros for `depth` layers, `batch` rows and `length` slots."""
    shape = (depth, batch * cfg.g, length, cfg.k)
    return {"k": jnp.zeros(shape, cfg.dtype), "v": jnp.zeros(shape, cfg.dtype)}


def write(cache_CSK: entries.Kept, new_BTGK: jax.Array, slots_BT: jax.Array) -> entries.Kept:
    """The cache with T new keys or values a row in the row's next slots, or in the same ones of all rows (slots_BT is
    [1, T]). Slots are consecutive within a row, so the first counts."""
    if caches.parts() == 1:
        return _write(cache_CSK, new_BTGK, slots_BT)
    caches.check(new_BTGK.shape[2], caches.parts())
    kept: Any = caches.spec(*rules.in_force())
    new: Any = context.spec("batch", None, "kv_heads")
    none: Any = P()
    if isinstance(cache_CSK, entries.Place):
        stacked: Any = P(None, *kept)
        kept = entries.Place(stacked, none)
    slots = context.spec("batch") if len(slots_BT) > 1 else none
    return context.per_device(_write, (kept, new, slots), kept, kernel=True)(cache_CSK, new_BTGK, slots_BT)


def _write(cache_CSK: entries.Kept, new_BTGK: jax.Array, slots_BT: jax.Array) -> entries.Kept:
    B, T, G, K = new_BTGK.shape
    new_CTK = new_BTGK.swapaxes(1, 2).reshape(B * G, T, K)
    slots_B = slots_BT[:, 0]
    return entries.write(cache_CSK, new_CTK, slots_B if len(slots_B) == 1 else jnp.repeat(slots_B, G))


def as_prompt(cache: LayerCache, valid: jax.Array) -> Shared:
    """What rows have in common, from the cache of their prompts (with or without a leading L) and which of its slots
    are filled [..., N, S]."""

    def apart(x: jax.Array, valid: jax.Array) -> jax.Array:
        *lead, N, S = valid.shape
        return x.reshape(*lead, N, -1, S, x.shape[-1])

    if caches.parts() > 1:
        lead = [None] * (valid.ndim - 2)
        kept, rows = caches.spec(*rules.in_force()), context.spec(*lead, "batch")
        heads = context.spec(*lead, "batch", "kv_heads")
        apart = context.per_device(apart, (P(*lead, *kept), rows), heads, kernel=True)
    return Shared(apart(cache["k"], valid), apart(cache["v"], valid), valid)
