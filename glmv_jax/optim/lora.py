"""LoRA: low-rank adapters of a model's matrices, as a small tree beside its parameters.

A matrix W [..., I, O] becomes W + alpha / rank * A B, A [..., I, R] drawn at random and B [..., R, O] zero (Hu et al.,
arXiv 2106.09685, section 4.1); whatever stands before I (layers, experts) has adapters of its own. The tree is
{"lora": {path of the matrix: {"a", "b"}}}. `train.lora` trains it.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax.trees import flatten, nest, replaced
from glmv_jax.typing import Axes, Params, UserError


def init_adapters(cfg: Any, shapes: Params, key: jax.Array) -> Params:
    """{"lora": nested dict}, float32, for the matrices of `shapes` that cfg.targets matches.

    cfg: rank, targets (regular expressions that match whole slash paths). UserError as for `target_paths`.
    """
    found = target_paths(cfg, shapes)
    adapters: Params = {}
    for (path, leaf), k in zip(found.items(), jax.random.split(key, len(found))):
        *stack, I, O = leaf.shape  # noqa: E741
        adapters[f"{path}/a"] = jax.random.normal(k, (*stack, I, cfg.rank), jnp.float32) * I**-0.5
        adapters[f"{path}/b"] = jnp.zeros((*stack, cfg.rank, O), jnp.float32)
    return {"lora": nest(adapters)}


def adapter_axes(cfg: Any, shapes: Params, axes: Axes) -> Axes:
    """Logical axes of `init_adapters`: A and B live where the rows and the columns of their matrix do."""
    named = flatten(axes, is_leaf=lambda x: isinstance(x, tuple))
    names: Axes = {}
    for path in target_paths(cfg, shapes):
        *stack, rows, columns = named[path]
        names |= {f"{path}/a": (*stack, rows, None), f"{path}/b": (*stack, None, columns)}
    return {"lora": nest(names)}


def apply_adapters(cfg: Any, base: Params, adapters: Params) -> Params:
    """`base` with W + alpha / rank * A B in place of each target W, summed in float32, in the dtype of W.

    cfg: rank, alpha. Differentiable in both; `base` may be of numpy arrays. This is also the merge for an export.
    """
    return replaced(base, merged_matrices(cfg, base, adapters))


def merged_matrices(cfg: Any, base: Params, adapters: Params) -> dict[str, jax.Array]:
    """The target matrices alone, by slash path, as `apply_adapters` puts them in place."""
    named, matrices = flatten(adapters["lora"]), flatten(base)

    def summed(path: str) -> jax.Array:
        product = jnp.matmul(named[f"{path}/a"], named[f"{path}/b"], precision="highest")
        w = matrices[path]
        return (w.astype(jnp.float32) + cfg.alpha / cfg.rank * product).astype(w.dtype)

    return {path: summed(path) for path in matrices if f"{path}/a" in named}


def target_paths(cfg: Any, shapes: Params) -> dict[str, Any]:
    """The leaves of `shapes` that are adapted, by slash path. UserError for an expression that matches no matrix."""
    named, found = flatten(shapes), set()
    for regex in cfg.targets:
        these = {p for p, x in named.items() if re.fullmatch(regex, p) and len(x.shape) >= 2}
        if not these:
            some = ", ".join([p for p, x in named.items() if p.endswith("kernel")][:3])
            raise UserError(f"lora.targets: {regex!r} matches no matrix; their whole paths are such as {some}")
        found |= these
    return {path: leaf for path, leaf in named.items() if path in found}
