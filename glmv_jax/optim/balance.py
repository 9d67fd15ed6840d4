"""Loss-free balancing of experts (arXiv 2408.15664): the router's bias follows the load, not a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax.typing import Params

BIAS = "router_bias"


def rebalanced(params: Params, aux: Mapping[str, Any], rate: float) -> Params:
    """`params` with every router bias moved by `rate` towards even loads, after a step that chose with it.

    aux: a tree with "load" [..., E] (tokens an expert, of the whole step) where `params` has a "moe" with a bias
    [..., E] of the same leading dimensions: {"blocks1": {"layer0": {"load": ...}}} beside
    {"blocks1": {"layer0": {"moe": {"router_bias": ...}}}}.
    Raises ValueError for a load without its bias.
    """
    changed = dict(params)
    for name, value in aux.items():
        if name == "load":
            if BIAS not in params.get("moe", {}):
                raise ValueError(f"a load of experts was reported where there is no {BIAS}: {sorted(params)}")
            changed["moe"] = params["moe"] | {BIAS: params["moe"][BIAS] + rate * step(value)}
        elif isinstance(value, Mapping):
            if name not in params:
                raise ValueError(f"loads were reported for {name!r}, which has no parameters")
            changed[name] = rebalanced(params[name], value, rate)
    return changed


def step(load_E: jax.Array) -> jax.Array:
    """+1 for an expert with fewer tokens than the mean of its layer, -1 for one with more, 0 at the mean."""
    return jnp.sign(load_E.mean(axis=-1, keepdims=True) - load_E)


def imbalance(load_E: jax.Array) -> jax.Array:
    """(largest load - mean) / mean of each layer, MaxVio of the paper; 0 is even."""
    mean = jnp.maximum(load_E.mean(axis=-1), 1e-9)
    return (load_E.max(axis=-1) - mean) / mean
