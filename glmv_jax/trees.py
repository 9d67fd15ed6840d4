"""Trees of arrays by the slash paths of their leaves: {"a": {"b": x}} is {"a/b": x}."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glmv_jax.typing import Params


def slash_path(path: tuple) -> str:
    """A jax key path as "decoder/blocks/q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Slash path -> leaf of any tree, in the order of `jax.tree.leaves`. is_leaf: as there."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {slash_path(path): leaf for path, leaf in leaves}


def nest(named: Mapping[str, Any]) -> Params:
    """The nested dict of what `flatten` gives: {"a/b": x} -> {"a": {"b": x}}."""
    tree: Params = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def inside(named: Mapping[str, Any], subtrees: Sequence[str]) -> dict[str, Any]:
    """The leaves whose path is one of the subtrees or below it; all when no subtree is named."""
    roots = tuple(f"{subtree.strip('/')}/" for subtree in subtrees)
    return {name: leaf for name, leaf in named.items() if not roots or f"{name}/".startswith(roots)}


def replaced(tree: Any, named: Mapping[str, Any]) -> Any:
    """`tree` with the leaves that `named` has in place of its own; what `named` has beyond those is left."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: named.get(slash_path(path), leaf), tree)


def put_like(x: Any, like: Any) -> Any:
    """A numpy array in the dtype of `like`, and where that is or, as a shape with a sharding, will be."""
    sharding = getattr(like, "sharding", None)
    x = np.asarray(x, like.dtype)
    return x if sharding is None else jax.device_put(x, sharding)
