"""The boundary: a model outside this folder is plain functions over plain nested dicts.

`init_params(cfg, key)`, `abstract_params(cfg)`, `logical_axes(cfg)` and `count(cfg)` serve every config that has
`module()` and `example()`; a config made of parts (VLM, two towers) lists them in `parts()`. Each model's file has its
`apply`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from glmv_jax.typing import Axes, Params


def _boxed(cfg: Any, key: jax.Array) -> Params:
    if hasattr(cfg, "parts"):
        parts = cfg.parts()
        keys = jax.random.split(key, len(parts))
        return {name: _boxed(part, k) for (name, part), k in zip(parts.items(), keys)}
    return cfg.module().init(key, *cfg.example())["params"]


def applied(module: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """What the module gives with these parameters."""
    return module.apply({"params": params}, *args, **kwargs)


def init_params(cfg: Any, key: jax.Array, shardings: Any = None) -> Params:
    """Fresh float32 parameters as a nested dict, placed by `shardings` (a matching tree) when given."""
    return jax.jit(lambda k: meta.unbox(_boxed(cfg, k)), out_shardings=shardings)(key)


def abstract_params(cfg: Any) -> Params:
    """The same tree of jax.ShapeDtypeStruct: nothing is allocated."""
    return jax.eval_shape(lambda k: meta.unbox(_boxed(cfg, k)), jax.random.key(0))


def logical_axes(cfg: Any) -> Axes:
    """The same tree with a tuple of logical axis names a leaf."""
    boxed = jax.eval_shape(lambda k: _boxed(cfg, k), jax.random.key(0))
    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def count(cfg: Any) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(cfg)))
