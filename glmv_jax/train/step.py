"""One training step: the gradient of the stage's loss, one update, and a guard against steps that ruin the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from glmv_jax.optim import slash_path
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train.stages.base import Stage
from glmv_jax.train.state import Placement, TrainState
from glmv_jax.typing import Batch, Params

RESERVED = ("loss", "grad_norm", "param_norm", "skipped")


class RecompileError(RuntimeError):
    """The step would be compiled again although it should not; the message shows the shapes that differ."""


def make_train_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    *,
    trainable: Params | None = None,
    seed: int = 0,
) -> TrainStep:
    """The compiled step of a stage: `(state, constants, batch) -> (state, metrics)`; it takes the memory of `state`.

    Args:
      trainable: the parameters' tree with False where a parameter is frozen: nothing is differentiated for those.
      seed: with the step number it makes the key that the loss gets.

    The update is skipped (parameters, optimiser and extra stay; the step counts) when the loss or the gradient is not
    finite. Metrics are those of the stage and loss, grad_norm, param_norm, skipped (0 or 1): scalars on the device.
    """
    return TrainStep(stage, optimizer, placement, trainable, seed)


class TrainStep:
    """The step, compiled once a batch shape and never again.

    Each shape is lowered and compiled by hand and kept, so a drift in the state (a dtype, a sharding) raises instead of
    compiling once more; `traces` counts how often Python ran the traced function, which must equal the shapes seen.
    """

    def __init__(self, stage, optimizer, placement: Placement, trainable: Params | None, seed: int) -> None:
        self.stage, self.optimizer, self.placement = stage, optimizer, placement
        self.trainable, self.seed = trainable, seed
        self.traces = 0
        self._compiled: dict[tuple, Any] = {}
        self._jitted = jax.jit(self._step, donate_argnums=0, out_shardings=(placement.state, placement.replicated))

    def __call__(self, state: TrainState, constants: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if self.is_new(batch):
            self.compile(state, constants, batch)
        return self._compiled[_signature(batch)](state, constants, batch)

    def is_new(self, batch: Batch) -> bool:
        """True when this batch would make the step compile."""
        return _signature(batch) not in self._compiled

    def compile(self, state: TrainState, constants: Params, batch: Batch) -> None:
        """Compiles the step for batches like this one; RecompileError when that is one shape too many."""
        signature, allowed = _signature(batch), self.stage.shape_buckets
        if len(self._compiled) >= allowed:
            raise RecompileError(
                f"stage {self.stage.name}: a batch has a new shape and all shape_buckets={allowed} are compiled: "
                f"{_difference(signature, list(self._compiled)[-1])}; pad the batches or raise shape_buckets"
            )
        with rules_lib.use(self.placement.mesh, self.placement.rules):
            self._compiled[signature] = self._jitted.lower(state, constants, batch).compile()
        if self.traces != len(self._compiled):
            raise RecompileError(f"the step was traced {self.traces} times for {len(self._compiled)} batch shapes")

    def _step(self, state: TrainState, constants: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        self.traces += 1  # runs when traced, not when executed
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)

        def loss_fn(params):
            if self.trainable is not None:
                params = jax.tree.map(lambda p, t: p if t else jax.lax.stop_gradient(p), params, self.trainable)
            return self.stage.loss(params, constants, state.extra, batch, key)

        (loss, (metrics, extra)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        taken = sorted(set(metrics) & set(RESERVED))
        if taken:
            raise ValueError(f"stage {self.stage.name} returns the metric {taken[0]}, which the step measures")
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = TrainState(state.step + 1, params, opt_state, extra)
        old = state._replace(step=state.step + 1)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = metrics | {
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(state.params),
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        return state, metrics


def _signature(batch: Batch) -> tuple:
    """(path, shape, dtype) of every array of the batch."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return tuple((slash_path(path), tuple(x.shape), str(x.dtype)) for path, x in leaves)


def _difference(new: tuple, old: tuple) -> str:
    before = {path: (shape, dtype) for path, shape, dtype in old}
    after = {path: (shape, dtype) for path, shape, dtype in new}
    show = lambda table, path: "{1} {0}".format(*table[path]) if path in table else "absent"  # noqa: E731
    names = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return ", ".join(f"{path} was {show(before, path)}, is {show(after, path)}" for path in names)
