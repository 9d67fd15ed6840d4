"""Loss-free balancing of experts (arXiv 2408.15664): the router's bias follows the load, not a gradient."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from glmv_jax.trees import flatten, replaced
from glmv_jax.typing import Params

BIAS = "router_bias"


def rebalanced(params: Params, loads: Mapping[str, jax.Array], rate: float) -> Params:
    """`params` with every router bias moved by `rate` towards even loads, after a step that chose with it.

    loads: {slash path of a bias [..., E]: tokens an expert, of the whole step}. Raises ValueError for another path.
    """
    here = flatten(params)
    unknown = set(loads) - set(here)
    if unknown:
        raise ValueError(f"a load of experts was reported for {sorted(unknown)[0]}, which is no parameter")
    return replaced(params, {path: here[path] + rate * step(load) for path, load in loads.items()})


def step(load_E: jax.Array) -> jax.Array:
    """+1 for an expert with fewer tokens than the mean of its layer, -1 for one with more, 0 at the mean."""
    return jnp.sign(load_E.mean(axis=-1, keepdims=True) - load_E)


def imbalance(load_E: jax.Array) -> jax.Array:
    """(largest load - mean) / mean of each layer, MaxVio of the paper; 0 is even."""
    mean = jnp.maximum(load_E.mean(axis=-1), 1e-9)
    return (load_E.max(axis=-1) - mean) / mean
