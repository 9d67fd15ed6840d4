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

from glmv_jax.optim.groups import slash_path
from glmv_jax.typing import Axes, Params, UserError


def init_adapters(cfg: Any, shapes: Params, key: jax.Array) -> Params:
    """{"lora": nested dict}, float32, for the matrices of `shapes` that cfg.targets matches.

    cfg: rank, targets (regular expressions that match whole slash paths). UserError as for `target_paths`.
    """
    found = target_paths(cfg, shapes)
    tree: Params = {}
    for (path, leaf), k in zip(found.items(), jax.random.split(key, len(found))):
        *stack, I, O = leaf.shape  # noqa: E741
        a = jax.random.normal(k, (*stack, I, cfg.rank), jnp.float32) * I**-0.5
        _put(tree, path, {"a": a, "b": jnp.zeros((*stack, cfg.rank, O), jnp.float32)})
    return {"lora": tree}


def adapter_axes(cfg: Any, shapes: Params, axes: Axes) -> Axes:
    """Logical axes of `init_adapters`: A and B live where the rows and the columns of their matrix do."""
    named = _named(axes, is_leaf=lambda x: isinstance(x, tuple))
    tree: Axes = {}
    for path in target_paths(cfg, shapes):
        *stack, rows, columns = named[path]
        _put(tree, path, {"a": (*stack, rows, None), "b": (*stack, None, columns)})
    return {"lora": tree}


def apply_adapters(cfg: Any, base: Params, adapters: Params) -> Params:
    """`base` with W + alpha / rank * A B in place of each target W, summed in float32, in the dtype of W.

    cfg: rank, alpha. Differentiable in both; `base` may be of numpy arrays. This is also the merge for an export.
    """
    named = _named(adapters["lora"])

    def leaf(path, w):
        name = slash_path(path)
        if f"{name}/a" not in named:
            return w
        product = jnp.matmul(named[f"{name}/a"], named[f"{name}/b"], precision="highest")
        return (w.astype(jnp.float32) + cfg.alpha / cfg.rank * product).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(leaf, base)


def target_paths(cfg: Any, shapes: Params) -> dict[str, Any]:
    """The leaves of `shapes` that are adapted, by slash path. UserError for an expression that matches no matrix."""
    named, found = _named(shapes), set()
    for regex in cfg.targets:
        these = {p for p, x in named.items() if re.fullmatch(regex, p) and len(x.shape) >= 2}
        if not these:
            some = ", ".join([p for p, x in named.items() if p.endswith("kernel")][:3])
            raise UserError(f"lora.targets: {regex!r} matches no matrix; their whole paths are such as {some}")
        found |= these
    return {path: leaf for path, leaf in named.items() if path in found}


def _named(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    return {slash_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def _put(tree: Params, path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
