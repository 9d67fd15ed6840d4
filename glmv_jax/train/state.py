"""The training state, and the one place that decides where its arrays live."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax import trees
from glmv_jax.optim import averaged
from glmv_jax.parallel import context, dispatch
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train.stages.base import Stage
from glmv_jax.typing import Batch, Params, UserError, VisionInput


class TrainState(NamedTuple):
    """Everything a step changes.

    step: [] int32, steps done (also those whose update was skipped). params, opt_state: as the optimiser has them.
    extra: what the stage carries without a gradient.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    extra: Params


# Arrays of a batch whose second dimension has to divide over the devices that share a row, and in what units.
_UNITS = {"tokens": ("tokens", 2), "frame": ("patches", 4)}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where things live: the state by the stage's logical axes and the rules, batches by rows, the rest everywhere.

    Where rows are split, their patches come in so; of tokens, which are few bytes, devices get whole rows, as
    `parallel.context` says.
    """

    mesh: Mesh
    rules: rules_lib.Rules
    state: TrainState  # of NamedSharding
    abstract: TrainState  # of jax.ShapeDtypeStruct, with those shardings
    constants: Params  # of NamedSharding
    replicated: NamedSharding

    def batch(self, batch: Batch) -> Batch:
        """The host's rows as one global array a leaf, split over the data axes; UserError when they do not divide."""

        def place(x: Any, sharding: NamedSharding) -> jax.Array:
            if isinstance(x, jax.Array):
                return jax.device_put(x, sharding)
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))

        return jax.tree.map(place, batch, self._of_batch(batch))

    def batch_shapes(self, batch: Batch) -> Batch:
        """As `batch`, for jax.ShapeDtypeStruct of this process' rows."""

        def place(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            shape = (x.shape[0] * jax.process_count(), *x.shape[1:]) if x.shape else ()
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(place, batch, self._of_batch(batch))

    def _of_batch(self, batch: Batch) -> Any:
        """The shardings of a batch of this process' rows."""
        rows, parts = rules_lib.batch_sharding(self.mesh), context.size(self.mesh, self.rules)
        patches = NamedSharding(self.mesh, self.rules.spec(("batch", "length"), self.mesh)) if parts > 1 else rows
        own_rows = "sent" in batch  # the encoder's

        def where(path: tuple, x: Any) -> NamedSharding:
            if not np.ndim(x):
                return self.replicated
            name, many = trees.slash_path(path).rpartition("/")[2], np.shape(x)[0] * jax.process_count()
            if own_rows and name in (*VisionInput._fields, "sent"):
                return dispatch.sharding(self.mesh, many)
            mesh_lib.check_batch(many, self.mesh)
            if parts > 1 and name in _UNITS:
                context.check(np.shape(x)[1], parts, *_UNITS[name])
            return patches if name in VisionInput._fields else rows

        return jax.tree_util.tree_map_with_path(where, batch)


def place(stage: Stage, optimizer: optax.GradientTransformation, mesh: Mesh, rules: rules_lib.Rules) -> Placement:
    """Shapes and shardings of the state of a run; nothing is allocated."""
    _check_context(stage, mesh, rules)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda: _fresh(stage, optimizer, jax.random.key(0)))
    params = rules.shardings(mesh, stage.logical_axes(), shapes.params)
    state = TrainState(
        step=replicated,
        params=params,
        opt_state=_like_params(shapes.opt_state, shapes.params, params, replicated),
        extra=jax.tree.map(lambda _: replicated, shapes.extra),
    )
    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    axes, constants = stage.constant_axes(), stage.constants()
    where = jax.tree.map(lambda _: replicated, constants) if axes is None else rules.shardings(mesh, axes, constants)
    return Placement(mesh, rules, state, jax.tree.map(put, shapes, state), where, replicated)


def _check_context(stage: Stage, mesh: Mesh, rules: rules_lib.Rules) -> None:
    """UserError when devices of the mesh's context axis would all do the same, or cannot get their rows."""
    n = mesh.shape.get(context.AXIS, 1)
    if n == 1:
        return
    if context.size(mesh, rules) == 1:
        raise UserError(f"mesh.context={n}, but these rules split no rows; use rules=fsdp_context")
    if not stage.splits_rows:
        raise UserError(f"stage {stage.name} has no rows to split over mesh.context={n}; use data or fsdp")
    if jax.process_count() > 1:
        of_a_row = np.moveaxis(mesh.devices, mesh.axis_names.index(context.AXIS), -1).reshape(-1, n)
        if any(len({device.process_index for device in row}) > 1 for row in of_a_row):
            raise UserError(f"mesh.context={n} goes over hosts, each of which reads rows of its own; make it smaller")


def init_state(
    stage: Stage, optimizer: optax.GradientTransformation, placement: Placement, seed: int, params: Params | None = None
) -> TrainState:
    """A fresh state, every array made where it lives. `params` replaces the random ones (a start from another run)."""
    fresh = jax.jit(lambda key, given: _fresh(stage, optimizer, key, given), out_shardings=placement.state)
    return fresh(jax.random.key(seed), params)


def evaluated(cfg: Any, state: TrainState) -> Params:
    """What evaluations and samples of a run are made with: its parameters, or with cfg.evaluate="ema" their average.

    Raises: UserError for another value, and when the run keeps no average.
    """
    which = cfg.get("evaluate", "params")
    if which not in ("params", "ema"):
        raise UserError(f"evaluate={which!r} is not known; choose params or ema")
    return state.params if which == "params" else averaged(state.opt_state, state.params)


def replaced(params: Params, given: Params) -> Params:
    """`params` with the subtrees of `given` (numpy, the same on every host) in place, where and what they were.

    Raises: UserError for a leaf of another shape, or one that is not there.
    """
    named, here = trees.flatten(given), trees.flatten(params)
    for name, leaf in named.items():
        if name not in here or here[name].shape != leaf.shape:
            have = f"has shape {here[name].shape} here" if name in here else "is not here"
            raise UserError(f"{name} of shape {tuple(leaf.shape)} is given, but {have}; use the weights of this model")
    return trees.replaced(params, {name: trees.put_like(leaf, here[name]) for name, leaf in named.items()})


def _fresh(
    stage: Stage, optimizer: optax.GradientTransformation, key: jax.Array, params: Params | None = None
) -> TrainState:
    params = stage.init_params(key) if params is None else params
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), stage.init_extra())


def _like_params(opt_shapes: Any, shapes: Params, shardings: Params, replicated: NamedSharding) -> Any:
    """Shardings of the optimiser state: a moment lives where its parameter does, counters everywhere.

    A moment is told by its path, which ends in the path of its parameter, and by its shape.
    """
    shape_of, place_of = trees.flatten(shapes), trees.flatten(shardings)

    def find(path: tuple, leaf: Any) -> Any:
        parts = trees.slash_path(path).split("/")
        for name in ("/".join(parts[start:]) for start in range(len(parts))):
            if name in shape_of and shape_of[name].shape == leaf.shape:
                return place_of[name]
        return replicated

    return jax.tree_util.tree_map_with_path(find, opt_shapes)
