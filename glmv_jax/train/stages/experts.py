"""What the blocks of a step say about themselves, by the parameters they speak of, and the balance of their experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax.optim import balance
from glmv_jax.trees import flatten
from glmv_jax.typing import Params

Said = dict[str, jax.Array]


def by_path(decoder: Any, drafts: Sequence[Any], shared: bool) -> Said:
    """{"decoder/blocks1/layer0/load": [L, E], "mtp/block/layer0/load": [E], ...}.

    decoder: what `vlm.apply` says; drafts: what `vlm.mtp_hidden` says, one a depth, whose losses are averaged and whose
    loads are added where they share their parameters, and stacked where not.
    """
    said = _flat(decoder, "decoder/")
    for path in _flat(drafts[0], "mtp/block/") if drafts else ():
        values = jnp.stack([_flat(draft, "mtp/block/")[path] for draft in drafts])
        if shared:
            values = values.sum(0) if path.endswith("/load") else values.mean(0)
        said[path] = values
    return said


def _flat(tree: Any, prefix: str) -> Said:
    return {prefix + path: x for path, x in flatten(tree).items()}


def means(said: Said, names: Sequence[str]) -> dict[str, jax.Array]:
    """The mean over all layers that say it, of each name. KeyError when none does."""
    found = {}
    for name in names:
        values = [jnp.ravel(x) for path, x in said.items() if path.rpartition("/")[2] == name]
        if not values:
            raise KeyError(name)
        found[name] = jnp.concatenate(values).mean()
    return found


# The loads of a step are summed up in what the step carries beside the parameters, under LOADS: {path of a router's
# bias: [..., E]}. Models without experts carry nothing.

LOADS = "loads"


def no_loads(params: Params) -> Params:
    """Zeros to begin with."""
    zeros = {p: jnp.zeros(x.shape, jnp.float32) for p, x in flatten(params).items() if p.endswith(balance.BIAS)}
    return {LOADS: zeros} if zeros else {}


def counted(extra: Params, said: Said) -> Params:
    """`extra` with the loads of one more pass."""
    if LOADS not in extra:
        return extra
    load_of = lambda path: said.get(path.removesuffix(f"moe/{balance.BIAS}") + "load", 0.0)  # noqa: E731
    return extra | {LOADS: {path: x + load_of(path) for path, x in extra[LOADS].items()}}


def settled(params: Params, extra: Params, rate: float) -> tuple[Params, Params, dict[str, jax.Array]]:
    """After a step: biases moved by `rate` towards even loads, which start at zero again, and how uneven they were."""
    if LOADS not in extra:
        return params, extra, {}
    loads = extra[LOADS]
    uneven = jnp.concatenate([jnp.ravel(balance.imbalance(load)) for load in loads.values()]).mean()
    params = balance.rebalanced(params, loads, rate) if rate else params
    return params, extra | {LOADS: jax.tree.map(jnp.zeros_like, loads)}, {"expert_imbalance": uneven}
