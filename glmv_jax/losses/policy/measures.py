"""How far what drew the tokens is from the trainer's policy, by source of data."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from glmv_jax.losses.cross_entropy import per_source
from glmv_jax.losses.policy.corrections import Mismatch

RATIO, SQUARE, SIZE = "mismatch_ratio", "mismatch_square", "mismatch_ess"


def mismatch_by_source(
    off: Mismatch, weight_BT: jax.Array, source_BT: jax.Array, source_N: jax.Array, names: Sequence[str]
) -> dict[str, jax.Array]:
    """The mismatch metrics of `policy_loss` as "<metric>/<source>", and "mismatch_gap/<source>_max".

    source_BT: index into `names`, -1 for none; source_N: the weight of each source in the whole step. They add up over
    pieces of a step; nan where a source is not in it.
    """
    values = {"mismatch_kl": off.kl_BT, "mismatch_masked": off.masked_BT, RATIO: off.ratio_BT,
              SQUARE: jnp.square(off.ratio_BT)}  # fmt: skip
    metrics: dict[str, jax.Array] = {}
    for key, value_BT in values.items():
        mean_N = per_source(value_BT, weight_BT, source_BT, len(names))[0] / source_N
        metrics |= {f"{key}/{name}": mean for name, mean in zip(names, mean_N)}
    gap_BT = jnp.where((weight_BT > 0) & (source_BT >= 0), jnp.abs(off.gap_BT), 0.0)
    most_N = jax.ops.segment_max(gap_BT.reshape(-1), jnp.maximum(source_BT, 0).reshape(-1), len(names))
    return metrics | {f"mismatch_gap/{name}_max": jnp.maximum(most, 0.0) for name, most in zip(names, most_N)}


def with_effective_sizes(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of a whole step with the effective sample size a token, (mean rho)^2 / mean rho^2 (1: every token counts
    alike), in place of these two means: "mismatch_ess", and by source."""
    found = {name: x for name, x in metrics.items() if not name.startswith((RATIO, SQUARE))}
    for name in (name for name in metrics if name.startswith(RATIO)):
        where = name.removeprefix(RATIO)
        found[SIZE + where] = jnp.square(metrics[name]) / metrics[SQUARE + where]
    return found
