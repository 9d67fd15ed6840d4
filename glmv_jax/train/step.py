"""One training step: the gradient of the stage's loss, one update, and a guard against steps that ruin the weights.

With cfg.accumulate = n the gradient is that of the same batch, taken in n pieces with the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glmv_jax.parallel import compiler, micro
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train.stages.base import Stage
from glmv_jax.train.state import Placement, TrainState
from glmv_jax.trees import flatten
from glmv_jax.typing import Batch, Params, UserError

RESERVED = ("loss", "grad_norm", "param_norm", "skipped")
# On a CPU a step is given its memory when it is started, not when its turn comes: one that needs more than this between
# its arguments and results is started when the one before is done.
ALONE = 1 << 30


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

    def __init__(
        self, stage: Stage, optimizer: optax.GradientTransformation, placement: Placement, trainable: Params | None,
        seed: int,
    ) -> None:  # fmt: skip
        self.stage, self.optimizer, self.placement = stage, optimizer, placement
        self.trainable, self.seed = trainable, seed
        self.platform = placement.mesh.devices.flat[0].platform
        self.options: dict[str, Any] = compiler.options((stage.cfg.get("xla", "auto"),), self.platform, "config.xla=")
        self.accumulate = stage.cfg.get("accumulate", 1)
        if self.accumulate < 1:
            raise UserError(f"accumulate={self.accumulate}: a batch has at least one piece")
        self.traces = 0
        self._compiled: dict[tuple, Any] = {}
        self._alone: set[tuple] = set()
        self._jitted = jax.jit(self._step, donate_argnums=0, out_shardings=(placement.state, placement.replicated))

    def __call__(self, state: TrainState, constants: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if self.is_new(batch):
            self.compile(state, constants, batch)
        signature = _signature(batch)
        if signature in self._alone:
            jax.block_until_ready(state)
        return self._compiled[signature](state, constants, batch)

    def is_new(self, batch: Batch) -> bool:
        """True when this batch would make the step compile."""
        return _signature(batch) not in self._compiled

    @property
    def memory(self) -> int:
        """Bytes of a device that the largest of the compiled steps needs, by the compiler: arguments, results that do
        not take an argument's place, and all that lies between. 0 where the compiler does not say."""
        found = [program.memory_analysis() for program in self._compiled.values()]
        return max((_bytes(m) for m in found if m is not None), default=0)

    @property
    def texts(self) -> list[str]:
        """The compiled steps as text, which says what each operation is of."""
        return [program.as_text() for program in self._compiled.values()]

    def compile(self, state: TrainState, constants: Params, batch: Batch) -> None:
        """Compiles the step for batches like this one; RecompileError when that is one shape too many."""
        signature, allowed = _signature(batch), self.stage.shape_buckets
        if len(self._compiled) >= allowed:
            raise RecompileError(
                f"stage {self.stage.name}: a batch has a new shape and all shape_buckets={allowed} are compiled: "
                f"{_difference(signature, list(self._compiled)[-1])}; pad the batches or raise shape_buckets"
            )
        program = self._compiled[signature] = self.lower(state, constants, batch).compile(self.options)
        between = program.memory_analysis()
        if self.platform == "cpu" and between is not None and between.temp_size_in_bytes > ALONE:
            self._alone.add(signature)
        if self.traces != len(self._compiled):
            raise RecompileError(f"the step was traced {self.traces} times for {len(self._compiled)} batch shapes")

    def lower(self, state: TrainState, constants: Params, batch: Batch) -> jax.stages.Lowered:
        """The step for batches like this one, not compiled yet."""
        with rules_lib.use(self.placement.mesh, self.placement.rules):
            return self._jitted.lower(state, constants, batch)

    def nonfinite(self, state: TrainState, constants: Params, batch: Batch) -> list[str]:
        """Names of what is not finite in the step that gave this state and was skipped, computed once more, in the
        order in which a step comes by it: batch, parameters, extra, loss, metrics, gradient.

        A metric may be nan in a good step as well, where it is the mean of nothing.
        """

        def look(state: TrainState, constants: Params, batch: Batch) -> list[dict[str, jax.Array]]:
            key = jax.random.fold_in(jax.random.key(self.seed), state.step - 1)
            (loss, (metrics, extra)), grads = self._gradient(state.params, constants, state.extra, batch, key)
            parts = [{"batch": batch}, {"params": state.params}, {"extra": state.extra}, {"loss": loss},
                     {"metrics": metrics}, {"gradient": grads}, {"new extra": extra}]  # fmt: skip
            number = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
            return [{n: jnp.isfinite(x).all() for n, x in flatten(part).items() if number(x)} for part in parts]

        with rules_lib.use(self.placement.mesh, self.placement.rules):
            parts = jax.device_get(jax.jit(look, out_shardings=self.placement.replicated)(state, constants, batch))
        return [name for part in parts for name, finite in part.items() if not finite]

    def _step(self, state: TrainState, constants: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        self.traces += 1  # runs when traced, not when executed
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)

        (loss, (metrics, extra)), grads = self._gradient(state.params, constants, state.extra, batch, key)
        metrics = self.stage.finished(metrics)
        with jax.named_scope("update"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params, extra, more = self.stage.after_update(optax.apply_updates(state.params, updates), extra)
        metrics |= more
        taken = sorted(set(metrics) & set(RESERVED))
        if taken:
            raise ValueError(f"stage {self.stage.name} returns the metric {taken[0]}, which the step measures")

        with jax.named_scope("guard"):
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

    def _gradient(self, params: Params, constants: Params, extra: Params, batch: Batch, key: jax.Array) -> tuple:
        """((loss, (metrics, new extra)), gradient): of the whole batch, or of its pieces one after the other.

        Only trained parameters are differentiated; the gradient of the others is the constant 0, which takes no memory.
        """
        leaves, tree = jax.tree.flatten(params)
        trained = [True] * len(leaves) if self.trainable is None else jax.tree.leaves(self.trainable)
        where = [s for s, t in zip(jax.tree.leaves(self.placement.state.params), trained, strict=True) if t]

        def loss_fn(moving: list[jax.Array], extra: Params, batch: Batch, key: jax.Array) -> tuple:
            rest = iter(moving)
            whole = jax.tree.unflatten(tree, [next(rest) if t else x for x, t in zip(leaves, trained)])
            return self.stage.loss(whole, constants, extra, batch, key)

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        moving = [x for x, t in zip(leaves, trained) if t]
        if self.accumulate == 1:
            result, grads = gradient(moving, extra, batch, key)
        else:
            result, grads = self._accumulated(gradient, moving, where, extra, batch, key)
        rest = iter(grads)
        whole = [next(rest) if t else jnp.zeros_like(x) for x, t in zip(leaves, trained)]
        return result, jax.tree.unflatten(tree, whole)

    def _accumulated(
        self, gradient: Callable, moving: list[jax.Array], where: Any, extra: Params, batch: Batch, key: jax.Array
    ) -> tuple:
        """As `gradient` of the batch, with the activations of one piece."""
        n = self.accumulate
        shared = self.stage.whole(batch, n)
        rows = {name: x for name, x in batch.items() if jnp.ndim(x)}
        B, shards = jax.tree.leaves(rows)[0].shape[0], mesh_lib.data_shards(self.placement.mesh)
        if B % (n * shards):
            raise UserError(
                f"batch={B} does not divide into accumulate={n} pieces over {shards} data shards; "
                f"try {-(-B // (n * shards)) * n * shards}"
            )

        def piece(carry: tuple, given: tuple) -> tuple[Any, Any]:
            total, extra = carry
            i, rows = given
            batch_i = batch | rows | {"whole": shared}
            (loss, (metrics, extra)), grads = gradient(moving, extra, batch_i, jax.random.fold_in(key, i))
            # Pinned to where the parameters are: a sum over devices is then no larger than a part of it.
            with jax.named_scope("accumulate"):
                total = [jax.lax.with_sharding_constraint(a + g, s) for a, g, s in zip(total, grads, where)]
            return (total, extra), (loss, metrics)

        zeros = [jax.lax.with_sharding_constraint(jnp.zeros_like(x), s) for x, s in zip(moving, where)]
        given = jnp.arange(n), micro.dealt(rows, n)
        (grads, extra), (losses, metrics) = jax.lax.scan(piece, (zeros, extra), given)
        metrics = {name: x.max() if name.endswith("_max") else x.sum() for name, x in metrics.items()}
        return (losses.sum(), (metrics, extra)), grads


def _bytes(m: Any) -> int:
    kept = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return kept + m.temp_size_in_bytes


def _signature(batch: Batch) -> tuple:
    """(path, shape, dtype) of every array of the batch."""
    return tuple((path, tuple(x.shape), str(x.dtype)) for path, x in flatten(batch).items())


def _difference(new: tuple, old: tuple) -> str:
    before = {path: (shape, dtype) for path, shape, dtype in old}
    after = {path: (shape, dtype) for path, shape, dtype in new}
    show = lambda table, path: "{1} {0}".format(*table[path]) if path in table else "absent"  # noqa: E731
    names = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return ", ".join(f"{path} was {show(before, path)}, is {show(after, path)}" for path in names)
