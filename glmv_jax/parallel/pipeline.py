"""The decoder's layers over the mesh axis `stage`: a circular pipeline, one collective permute a step.

With S stages and R repeats, L layers are R * S pieces of neighbours, and stage s has pieces s, S + s, 2 S + s, ...
(interleaved: Narayanan et al., arXiv 2104.04473, section 2.2). Rows are cut into M microbatches, M a multiple of S,
which go through the pieces S at a time: in step i stage s works on item j = i - s of

    j = (group * R + repeat) * S + n,   microbatch = group * S + n,

so that what a stage is handed, the first by the last too, is what it works on next, and nothing waits in between. A
pass takes M R + S - 1 steps. In S - 1 of them a stage has nothing to do (and works on numbers that nobody reads): a
share of (S - 1) / (M R + S - 1), forward, and backward again, which is the same scan the other way.

L layers that do not divide become R S N, the last of which are skipped: N = ceil(L / (R S)) layers a piece, and as all
stages wait for the slowest, the pipeline takes R S N / L of the time that it would take if layers could be cut: for
GLM-5's 75 mixtures of experts 1.3 % more on 4 stages and 6.7 % on 8 and 16 (on 16 the last one idles: 15 are as fast).
What is not in the pipeline (dense layers in front, towers, heads) is shared out evenly by rows and costs no more.

Where things live:
- Parameters, and what an optimiser keeps of them: each stage has its L / S layers, stored in the order of layers. With
  R > 1 the pieces of a stage are not neighbours and change places at the beginning of a pass, their gradients at its
  end: each device then sends and gets at most what it has, once. Layers that do not divide are stored by widths, as
  over fsdp (`rules.Rules.shardings`), so that a run's parameters have the same shapes on any mesh; they too go to their
  stages at the beginning of a pass, by one all-to-all a matrix, and their gradients come back by another.
- Hidden states, by pipeline.ends. "rows": outside of the pipeline rows are split over `stage` as over `data`, so that
  towers, embeddings, heads and losses are computed once, not once a stage; the first stage gathers them, the last
  scatters its results. "stages": what is before the layers is the first stage's alone, what comes after them the
  last's, as where stages are programs of their own; meanwhile the others work on padding, so this is for measuring:
  what a head reads besides hidden states then has to cross (`to_last`), where with "rows" it is there.
- What goes with a microbatch through the layers (rotations, segments): whole everywhere; each stage looks its up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import data_axes
from glmv_jax.typing import UserError

AXIS, LAYERS = "stage", "pipeline"  # the mesh axis, and the logical axis that lives on it


class Schedule(NamedTuple):
    """Who works on what in which step: see the head of this file."""

    stages: int
    repeats: int
    microbatches: int

    @property
    def work(self) -> int:
        """Items of one stage."""
        return self.microbatches * self.repeats

    @property
    def steps(self) -> int:
        return self.work + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its steps in which a stage has nothing to do."""
        return (self.stages - 1) / self.steps

    def item(self, step: Any, stage: Any) -> tuple[Any, Any]:
        """(repeat, microbatch) of a stage in a step; in a bubble those of its first or last item."""
        S = self.stages
        group, within = jnp.divmod(jnp.clip(step - stage, 0, self.work - 1), self.repeats * S)
        return within // S, group * S + within % S


def plan(rows: int, layers: int) -> Schedule | None:
    """The schedule of `layers` layers in the step that is being traced; None where it has no stages.

    Raises: UserError when layers or rows do not divide.
    """
    S, found = _stages(), rules_lib.active()
    if S == 1 or found is None:
        return None
    mesh, rules = found
    R, shards = rules.repeats, _shards(mesh)
    if layers < S * R:
        raise UserError(
            f"{layers} layers are too few for stage={S} x pipeline.repeats={R}; the product must be {layers} at most"
        )
    rows //= _parts()
    M = rules.microbatches or max((S * n for n in range(1, 5) if rows % (shards * S * n) == 0), default=S)
    if M % S or rows % (shards * M):
        raise UserError(
            f"{rows} rows over {shards} data shards do not go through stage={S} in pipeline.microbatches={M}, which "
            f"must be a multiple of {S}; rows must be one of {shards} x microbatches"
        )
    return Schedule(S, R, M)


def run(
    plan: Schedule,
    layer: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    params: Any,
    x_BTD: jax.Array,
    beside: Any,
    combine: Callable[[Any], Any],
    unroll: int = 1,
) -> tuple[jax.Array, Any]:
    """x after all layers, and what the layers say about themselves, leaves [L, ...].

    Args:
      layer: (parameters of one layer, x, beside) -> (x, what it says). Within it the axis `stage` is manual, and
        by the rules in force nothing lives on it.
      params: leaves [L, ...].
      x_BTD, and beside, a tree of what layers read with it: leaves [B, ...], or [1, ...] for all rows alike.
      combine: from what M microbatches say of some layers, leaves [M, ...], what the batch says, leaves [...].
      unroll: layers a turn of the loop over a piece.
    """
    mesh, rules = rules_lib.in_force()
    B, M, shards = len(x_BTD), plan.microbatches, _shards(mesh)

    def dealt(  # microbatches over `axis`, their rows over data, and the rest as it comes
        x: jax.Array, axis: str | None
    ) -> jax.Array:
        x = _dealt(x, shards, M * _parts())
        spec = PartitionSpec(axis, _rows(mesh), *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 2))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    beside = jax.tree.map(lambda x: dealt(x, None)[:M] if len(x) == B else x, beside)
    layers = jax.tree.leaves(params)[0].shape[0]
    fill = padding(layers, plan.stages, plan.repeats)
    params = jax.tree.map(lambda w: jnp.pad(w, [(0, fill), *[(0, 0)] * (w.ndim - 1)]) if fill else w, params)

    def local(stage_1: jax.Array, params: Any, xs: jax.Array, beside: Any) -> tuple:
        with rules_lib.use(mesh, rules.without(AXIS)):
            own = _skipping(layer, layers) if fill else lambda number, *args: layer(*args)
            return _stage(plan, own, stage_1[0], params, xs, beside, combine, unroll)

    on_stage, whole = PartitionSpec(AXIS), PartitionSpec()
    # check_vma off: nothing whole comes out, and sums over stages are explicit. The number of the stage comes in as
    # data, because a device cannot ask for it where other axes are the compiler's.
    ys, said = jax.shard_map(
        local, mesh=mesh, axis_names={AXIS}, in_specs=(on_stage, on_stage, on_stage, whole),
        out_specs=(on_stage, PartitionSpec(None, AXIS)), check_vma=False,
    )(jnp.arange(plan.stages), params, dealt(x_BTD, AXIS), beside)  # fmt: skip
    return _gathered(ys, shards), jax.tree.map(lambda x_RSN: x_RSN.reshape(-1, *x_RSN.shape[3:])[:layers], said)


def padding(layers: int, stages: int, repeats: int = 1) -> int:
    """How many layers a pipeline has beyond these, which it skips."""
    return -layers % (stages * repeats)


def _skipping(layer: Callable, layers: int) -> Callable:
    """(number of a layer, its parameters, x, beside) -> as `layer`; from number `layers` on x as it is, and zeros."""

    def run(number: jax.Array, w: Any, x: jax.Array, beside: Any) -> tuple:
        said = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(layer, w, x, beside)[1])
        return jax.lax.cond(number < layers, lambda: layer(w, x, beside), lambda: (x, said))

    return run


def _stage(
    plan: Schedule, layer: Callable, stage: jax.Array, params: Any, xs: jax.Array, beside: Any, combine: Callable,
    unroll: int,
) -> tuple:  # fmt: skip
    """What one stage does: (its part of the results, leaves [M / S, ...], what its layers say [R, 1, N, ...])."""
    S, R, M = plan
    pieces = _regrouped(plan, stage, params)
    split = len(xs) < M  # pipeline.ends: rows
    xs = _to_first(S, xs) if split else xs
    links = [(s, (s + 1) % S) for s in range(S if R > 1 else S - 1)]

    def step(carry: tuple, i: jax.Array) -> tuple[Any, Any]:
        x, outs = carry
        repeat, microbatch = plan.item(i, stage)
        x = jnp.where((stage == 0) & (repeat == 0), _take(xs, microbatch), x)
        own = jax.tree.map(lambda a: _take(a, microbatch) if len(a) == M else a, beside)
        piece = jax.tree.map(lambda w: _take(w, repeat), pieces)
        N = len(jax.tree.leaves(piece)[0])
        numbers = (repeat * S + stage) * N + jnp.arange(N)
        x, said = jax.lax.scan(lambda x, nw: layer(nw[0], nw[1], x, own), x, (numbers, piece), unroll=unroll)
        # A microbatch is written R times; what the last stage writes last is its result.
        outs = jax.lax.dynamic_update_index_in_dim(outs, x, microbatch, axis=0)
        return (jax.lax.ppermute(x, AXIS, links), outs), said

    (_, outs), said = jax.lax.scan(step, (jnp.zeros_like(xs[0]), jnp.zeros_like(xs)), jnp.arange(plan.steps))
    outs = _from_last(S, stage, outs) if split else outs

    def by_microbatch(x: jax.Array) -> jax.Array:  # [steps, N, ...] -> [M, R, N, ...]
        items = jax.lax.dynamic_slice_in_dim(x, stage, plan.work).reshape(M // S, R, S, *x.shape[1:])
        return items.swapaxes(1, 2).reshape(M, R, *x.shape[1:])

    return outs, jax.tree.map(lambda x_RN: x_RN[:, None], combine(jax.tree.map(by_microbatch, said)))


# Permutes, and no all-gather and reduce-scatter: for those the compiler would make rows whole that are split over data.


def _to_first(S: int, xs: jax.Array) -> jax.Array:
    """The microbatches [M / S, ...] of all stages, [M, ...], on the first; zeros for those of others elsewhere."""
    return jnp.concatenate([xs, *(jax.lax.ppermute(xs, AXIS, [(s, 0)]) for s in range(1, S))])


def _from_last(S: int, stage: jax.Array, outs: jax.Array) -> jax.Array:
    """Of [M, ...] of the last stage each stage's [M / S, ...]."""
    *others, own = jnp.split(outs, S)
    sent = [jax.lax.ppermute(part, AXIS, [(S - 1, s)]) for s, part in enumerate(others)]  # zeros where none goes
    return sum(sent, jnp.where(stage == S - 1, own, 0))


def _regrouped(plan: Schedule, stage: jax.Array, params: Any) -> Any:
    """This stage's layers [L / S, ...], which are neighbours, -> its pieces [R, N, ...]: R permutes.

    Piece c is stored on stage c // R and belongs to stage c % S. In a round of permutes each stage sends one and gets
    one: piece c goes in round (c + c // lcm(R, S)) % R, another one than other pieces of its origin, and of its goal.
    """
    S, R, _ = plan
    pieces = jax.tree.map(lambda w: w.reshape(R, -1, *w.shape[1:]), params)
    if R == 1:
        return pieces
    result = jax.tree.map(jnp.zeros_like, pieces)
    for n in range(R):
        moved = [c for c in range(R * S) if (c + c // math.lcm(R, S)) % R == n]
        send = jnp.array([c % R for c in sorted(moved, key=lambda c: c // R)])[stage]
        put = jnp.array([c // S for c in sorted(moved, key=lambda c: c % S)])[stage]
        out = jax.tree.map(lambda w, send=send: _take(w, send), pieces)
        got = jax.lax.ppermute(out, AXIS, [(c // R, c % S) for c in moved])
        result = jax.tree.map(lambda w, x, put=put: jax.lax.dynamic_update_index_in_dim(w, x, put, axis=0), result, got)
    return result


# --- ends="stages": rows that one stage has, and that are padding elsewhere -------------------------------------------


def on_first(rows: Any) -> Any:
    """A tree of [B, ...] as the first stage's own: [S B, ...] with zeros for the others. With ends="rows" as it is."""
    return jax.tree.map(lambda x: _own(x, 0), rows)


def on_last(rows: Any) -> Any:
    """As `on_first`, the last stage's: what reads hidden states that come out of the layers."""
    return jax.tree.map(lambda x: _own(x, _parts() - 1), rows)


def to_last(x: jax.Array) -> jax.Array:
    """What the first stage has [S B, ...], sent to the last."""
    S = _parts()
    if S == 1:
        return x
    mesh, _ = rules_lib.in_force()
    send = lambda x: jax.lax.ppermute(x, AXIS, [(0, S - 1)])  # noqa: E731
    where = PartitionSpec(None, AXIS)
    sent = jax.shard_map(send, mesh=mesh, axis_names={AXIS}, in_specs=where, out_specs=where, check_vma=False)
    return _over_stages(mesh, sent(x.reshape(_shards(mesh), S, -1, *x.shape[1:])))


def _own(x: jax.Array, stage: int) -> jax.Array:
    if _parts() == 1:
        return x
    mesh, _ = rules_lib.in_force()
    x = x.reshape(_shards(mesh), 1, -1, *x.shape[1:])
    x = jnp.pad(x, [(0, 0), (stage, _parts() - 1 - stage), *[(0, 0)] * (x.ndim - 2)])
    return _over_stages(mesh, x)


def _over_stages(mesh: Mesh, x: jax.Array) -> jax.Array:
    """[shards, S, b, ...] -> [shards * S * b, ...], each on its own stage."""
    spec = PartitionSpec(_rows(mesh), AXIS, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 2))
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return x.reshape(-1, *x.shape[3:])


# --- the mesh and rules in force --------------------------------------------------------------------------------------


def _stages() -> int:
    if (found := rules_lib.active()) is None:
        return 1
    mesh, rules = found
    return mesh.shape.get(AXIS, 1) if rules.table.get(LAYERS) == AXIS else 1


def _parts() -> int:
    """How many times the rows of a batch there are outside of the layers: 1, or S of which one is not padding."""
    found = rules_lib.active()
    return _stages() if found is not None and found[1].ends == "stages" else 1


def _rows(mesh: Mesh) -> tuple[str, ...]:
    """The axes besides `stage` that split the rows of a batch."""
    return tuple(axis for axis in data_axes(mesh) if axis != AXIS)


def _shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _rows(mesh))


def _take(x: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False)


def _dealt(x: jax.Array, shards: int, M: int) -> jax.Array:
    """[B, ...] -> [M, B / M, ...], each microbatch with rows of all data shards, so that none has to move."""
    return x.reshape(shards, M, -1, *x.shape[1:]).swapaxes(0, 1).reshape(M, -1, *x.shape[1:])


def _gathered(x: jax.Array, shards: int) -> jax.Array:
    """The inverse of `_dealt`."""
    return x.reshape(len(x), shards, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
