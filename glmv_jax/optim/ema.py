"""A running average of the parameters, kept by the optimiser: saved, sharded and skipped as its other state is.

average <- decay * average + (1 - decay) * parameters, after each update, in float32, from the first parameters on
(Polyak and Juditsky, 1992; with a constant decay as in Mean Teacher, arXiv 1703.01780).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glmv_jax.typing import Params, UserError


class AverageState(NamedTuple):
    """average: float32, the shape of the parameters that are trained."""

    average: Params


def average_params(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are; it has to come last, where they are what will be added. UserError unless 0 < decay <
    1."""
    if not 0 < decay < 1:
        raise UserError(f"ema={decay} is no decay; give a number between 0 and 1, such as 0.999, or 0 for no average")

    def init(params: Params) -> AverageState:
        return AverageState(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params))

    def update(updates: Any, state: AverageState, params: Params | None = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p.astype(jnp.float32), state.average, new)
        return updates, AverageState(average)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any, params: Params) -> Params:
    """`params` with the average in place of each that is trained. UserError when the optimiser keeps none."""
    is_average = lambda x: isinstance(x, AverageState)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(x)]
    if not found:
        raise UserError("this run keeps no average of its parameters; set ema=0.999 and train it so")
    frozen = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    pick = lambda a, p: p if frozen(a) else a.astype(p.dtype)  # noqa: E731
    return jax.tree.map(pick, found[0].average, params, is_leaf=frozen)
