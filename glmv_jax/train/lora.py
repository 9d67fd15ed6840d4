"""Adapters (`optim.lora`) are trained in place of the parameters, which stay as another run left them.

The trained tree is that of the adapters, so the optimiser state, the average and the checkpoints are theirs; the base
lives among the step's constants, in lora.dtype: float32, bfloat16, or "stored", what its checkpoint has.

The sum is formed once a step, in the dtype of the base, rather than as a second small product in each layer: so any
matrix of any model can be a target, and a run computes exactly what its merged weights do: in bfloat16 a change below
half a step of a weight is lost here as it is in an export. The price is a copy of the target matrices and of their
gradient while a step runs: with a base in bfloat16 as much as the float32 gradients of full training, whose parameters
and moments in float32 are spared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glmv_jax.optim.lora import adapter_axes, apply_adapters, init_adapters, merged_matrices
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import checkpoint, weights
from glmv_jax.train.stages import experts
from glmv_jax.train.stages.base import DataIterator, Stage
from glmv_jax.train.state import Placement
from glmv_jax.trees import nest, replaced
from glmv_jax.typing import Axes, Batch, Params, UserError


def adapted(stage: Stage) -> Stage:
    """The stage with adapters in place of its parameters where its config has a rank for them, else itself."""
    return Adapted(stage) if stage.cfg.get("lora", {}).get("rank", 0) else stage


class Adapted(Stage):
    """A stage whose trained parameters are adapters of those of the finished run cfg.lora.base.

    The model that the inner stage sees, in its loss, its rollouts and its evaluations, is the adapted one.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.cfg)
        self.stage, self.lora = stage, stage.cfg.lora
        self.name, self.headline = stage.name, stage.headline
        self.shape_buckets, self.on_policy = stage.shape_buckets, stage.on_policy
        self.splits_rows, self.host_only = stage.splits_rows, stage.host_only
        if not self.lora.base:
            raise UserError("lora.rank is set and lora.base is not; give the run whose parameters are adapted")
        self.shapes = jax.eval_shape(stage.init_params, jax.random.key(0))
        self._merged = jax.jit(lambda base, adapters: merged_matrices(self.lora, base, adapters))
        self._host: Params | None = None
        self._base: Params | Any = None  # None before `begin`

    # --- what is trained, and what stays ------------------------------------------------------------------------------
    def init_params(self, key: jax.Array) -> Params:
        return init_adapters(self.lora, self.shapes, key)

    def logical_axes(self) -> Axes:
        return adapter_axes(self.lora, self.shapes, self.stage.logical_axes())

    def constants(self) -> Params:
        if self._host is None:
            arrays = weights.opened(self.lora.base)
            checkpoint.taken(self.lora.base, dict(arrays), (), self.shapes)
            as_kept = lambda x: x[()].astype(weights.kept_as(self.lora, x.dtype), copy=False)  # noqa: E731
            self._host = nest({path: as_kept(array) for path, array in arrays.items()})  # one at a time
        return {"base": self._host, "stage": self.stage.constants()}

    def constant_axes(self) -> Axes | None:
        axes = self.stage.constant_axes()
        if axes is None:
            axes = jax.tree.map(lambda x: (None,) * np.ndim(x), self.stage.constants())
        return {"base": self.stage.logical_axes(), "stage": axes}

    def init_extra(self) -> Params:
        return {"stage": self.stage.init_extra(), "base": jnp.zeros((), jnp.float32)}

    def begin(self, placement: Placement, constants: Params, extra: Params, *, fresh: bool) -> Params:
        """Also sees to it that a run that goes on has the base that it began with."""
        self._base, self._host = constants["base"], None
        size = np.float32(_size(self._base))
        if fresh:
            extra = extra | {"base": jax.device_put(size, placement.replicated)}
        elif not np.isclose(float(extra["base"]), size, rtol=1e-4):
            raise UserError(
                f"lora.base={Path(self.lora.base)} has other parameters than when this run began; adapters fit only "
                "those: give that base, or start anew in another workdir"
            )
        inner = self.stage.begin(placement, constants["stage"], extra["stage"], fresh=fresh)
        return extra | {"stage": inner}

    def _apply(self, base: Params, adapters: Params) -> Params:
        """The adapted model; what has no adapters is the base's own memory."""
        return replaced(base, self._merged(base, adapters))

    # --- one step -----------------------------------------------------------------------------------------------------
    def train_data(self) -> DataIterator:
        return self.stage.train_data()

    def batch_shapes(self) -> Iterable[Batch]:
        return self.stage.batch_shapes()

    def next_batch(self, data: Any, state: Any) -> Any:
        if self.on_policy:
            state = state._replace(params=self._apply(self._base, state.params))
        return self.stage.next_batch(data, state)

    def loss(
        self, params: Params, constants: Params, extra: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
        model = apply_adapters(self.lora, constants["base"], params)
        loss, (metrics, inner) = self.stage.loss(model, constants["stage"], extra["stage"], batch, key)
        return loss, (metrics, extra | {"stage": inner})

    def whole(self, batch: Batch, pieces: int = 1) -> Params:
        return self.stage.whole(batch, pieces)

    def finished(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return self.stage.finished(metrics)

    def counts(self, batch: Batch) -> dict[str, int]:
        return self.stage.counts(batch)

    def counts_by_source(self, batch: Batch) -> dict[str, dict[str, int]]:
        return self.stage.counts_by_source(batch)

    def flops(self, batch: Batch) -> float:
        """As of the whole model being trained: the gradient of a target matrix is computed here too."""
        return self.stage.flops(batch)

    def place(self, mesh: Any = None) -> tuple[Mesh, rules_lib.Rules]:
        return self.stage.place(mesh)

    # --- what is reported ---------------------------------------------------------------------------------------------
    def after_update(self, params: Params, extra: Params) -> tuple[Params, Params, dict[str, jax.Array]]:
        """The base stands still: only what the stage counted begins anew."""
        _, inner, metrics = experts.settled({}, extra["stage"], 0.0)
        return params, extra | {"stage": inner}, metrics

    def evaluate(self, params: Params, extra: Params, *, full: bool) -> dict[str, float]:
        return self.stage.evaluate(self._apply(self._base, params), extra["stage"], full=full)

    def notes(self) -> dict[str, dict[str, Any]]:
        return self.stage.notes()

    def write_samples(self, params: Params, extra: Params, folder: Path) -> None:
        self.stage.write_samples(self._apply(self._base, params), extra["stage"], folder)


@jax.jit
def _size(params: Params) -> jax.Array:
    """The mean over leaves of their mean magnitude: the same on any number of devices, up to rounding."""
    sizes = [jnp.abs(x.astype(jnp.float32)).mean() for x in jax.tree.leaves(params)]
    return jnp.stack(sizes).mean()
