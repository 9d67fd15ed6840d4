"""What a stage of training is: parameters, data, a loss, an evaluation. The loop is the same for all of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import Axes, Batch, Params, UserError

if TYPE_CHECKING:
    from glmv_jax.eval.towers import Towers
    from glmv_jax.train.state import Placement, TrainState


class DataIterator(Protocol):
    """Endless batches as dicts of numpy arrays, with a position that JSON can hold.

    `set_state(get_state())` on a new iterator must continue with exactly the batch that would have come next.
    """

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Stage(abc.ABC):
    """One stage of the recipe. Subclasses are made from the config alone and hold no training state.

    The loop calls, in this order: `init_params` (traced, for shapes and for values), `logical_axes`, `init_extra`,
    `constants`, `begin`, `train_data`, `evaluate` (the untrained numbers), then again and again `next_batch` and,
    inside the jitted step, `loss`; at the end `evaluate`, `write_samples` and `notes`.

    Attributes:
      name: what progress lines and results call the stage.
      shape_buckets: how many different batch shapes the data may have. Each is compiled once; one more stops the run,
        because a shape that keeps changing compiles for ever without anybody noticing.
      headline: the metric that progress lines show.
      on_policy: batches are made with the parameters of the step before, so the loop waits for it first.
      host_only: of a batch's arrays those that the host alone reads (`counts_by_source`): no step is given them.
      splits_rows: the positions of a row may be split over devices (`parallel.context`).
      cfg: the config of the run.
    """

    name: str = ""
    shape_buckets: int = 1
    headline: str = "loss"
    on_policy: bool = False
    splits_rows: bool = False
    host_only: tuple[str, ...] = ()

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    # --- what is trained, and what the step carries beside it ---------------------------------------------------------

    @abc.abstractmethod
    def init_params(self, key: jax.Array) -> Params:
        """Fresh trainable parameters, float32. Traced under jit, so that they are born where they live: no files."""

    def given_params(self) -> Params:
        """Subtrees of `init_params` that a fresh run takes from files: public weights, as numpy arrays of any dtype.

        Asked once, before the first step of a run that starts from nothing or from parts of another one.
        """
        return {}

    @abc.abstractmethod
    def logical_axes(self) -> Axes:
        """The tree of `init_params` with a tuple of logical axis names (`parallel.axes`) a leaf."""

    def constants(self) -> Params:
        """Arrays the step reads and never changes: teachers, a reference policy. Where they live: `constant_axes`."""
        return {}

    def init_extra(self) -> Params:
        """State that the step carries without a gradient: running statistics of teachers. Traced under jit."""
        return {}

    def constant_axes(self) -> Axes | None:
        """The tree of `constants` with logical axis names a leaf, to split them as parameters are; None: whole."""
        return None

    def begin(self, placement: Placement, constants: Params, extra: Params, *, fresh: bool) -> Params:
        """Called once, with everything where it lives and before the first evaluation; returns `extra`.

        fresh: nothing was restored, so what has to be measured before the first step is measured here. `constants` may
        be kept: an evaluation then uses the very arrays that the step reads.
        """
        del placement, constants, fresh
        return extra

    # --- one step ---------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def train_data(self) -> DataIterator:
        """A new iterator over training batches, at its beginning."""

    @property
    def own_rows(self) -> int:
        """Rows that this process makes of a batch; `cfg.batch` counts those of all processes.

        Raises: UserError when they do not divide.
        """
        batch, n = self.cfg.batch, jax.process_count()
        if batch % n:
            raise UserError(f"batch={batch} does not divide over {n} processes; try {-(-batch // n) * n}")
        return batch // n

    def batch_shapes(self) -> Iterable[Batch]:
        """jax.ShapeDtypeStruct of the batches to come, of this process' rows, for programs to be compiled before the
        first step; none: each is compiled when it is met."""
        return ()

    def next_batch(self, data: DataIterator, state: TrainState) -> tuple[Batch, dict[str, float]]:
        """The next batch (numpy arrays, leading dimension = rows) and metrics that were measured while making it.

        Reinforcement learning overrides it: prompts -> rollouts with `state.params` -> rewards -> batch. Arrays of
        `state` must not be kept: the step that follows takes their memory.
        """
        return next(data), {}

    @abc.abstractmethod
    def loss(
        self, params: Params, constants: Params, extra: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
        """Pure and jitted: (scalar loss, (scalar metrics, new extra)).

        `key` depends on the seed and the step only. Metric names loss, grad_norm, param_norm, skipped are taken.
        """

    def whole(self, batch: Batch, pieces: int = 1) -> Params:
        """What `loss` has to know of a whole batch, to be given it in pieces: sums of weights that means divide by.

        Pure and jitted. A piece comes to `loss` as a batch that has this under "whole". Then losses of pieces, their
        gradients and their metrics add up to those of the batch, whatever each piece weighs; of metrics whose name ends
        in _max the largest counts. Something that is a mean over rows is multiplied by 1 / pieces.

        Raises: UserError, by default: then the loss is one of whole batches, and cfg.accumulate has to be 1.
        """
        raise UserError(f"accumulate={pieces}: the loss of stage {self.name} is one of whole batches; set accumulate=1")

    def finished(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The metrics of a whole batch, from those of `loss` that its pieces have added up. Jitted."""
        return metrics

    def after_update(self, params: Params, extra: Params) -> tuple[Params, Params, dict[str, jax.Array]]:
        """What moves without a gradient once the optimiser has moved the rest: (params, extra, metrics). Jitted."""
        return params, extra, {}

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """{"samples": n, "tokens": n} of a batch as `next_batch` gave it; tokens are real ones, without padding."""

    def counts_by_source(self, batch: Batch) -> dict[str, dict[str, int]]:
        """Of a batch as `next_batch` gave it: source -> {"samples": n, "tokens": n}, of what is trained on of each; {}
        for a stage whose batches do not say where their rows are from."""
        del batch
        return {}

    @abc.abstractmethod
    def flops(self, batch: Batch) -> float:
        """Floating-point operations that the model needs for one step on the batch (recomputation not counted)."""

    # --- where it lives -----------------------------------------------------------------------------------------------

    def place(self, mesh: Any = None) -> tuple[Mesh, rules_lib.Rules]:
        """The mesh (or the one given) and the rules of the config. UserError when they do not fit the devices here."""
        if mesh is None:
            mesh = mesh_lib.make_mesh(dict(self.cfg.get("mesh", {"data": -1})))
        rules = rules_lib.preset(self.cfg.get("rules", "data"))
        return mesh, dataclasses.replace(rules, **self.cfg.get("pipeline", {}))

    def as_towers(self, *, patches: int = 0, batch: int = 256) -> Towers:
        """What `eval.datasets` needs of the model. patches: of a picture, 0 for as many as its evaluations have.
        batch: rows at a time. UserError for a stage whose model has no features of pictures to give."""
        raise UserError(f"stage {self.name} is not evaluated on data sets; give a run of mim or siglip")

    # --- what is reported ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def evaluate(self, params: Params, extra: Params, *, full: bool) -> dict[str, float]:
        """Numbers on held-out data. `full` at the beginning and the end; False for the short look during training.

        The same names and the same examples each time `full` is the same; it may be interrupted and called again.
        """

    def notes(self) -> dict[str, dict[str, Any]]:
        """For names of `evaluate`: {"chance": the number blind guessing gets (or None), "note": what is measured}."""
        return {}

    def write_samples(self, params: Params, extra: Params, folder: Path) -> None:
        """Writes samples.jsonl and pictures for the report into the (existing, empty) folder; nothing by default."""
        del params, extra, folder


def rows_by_source(names: Sequence[str], source_B: Any, tokens: int) -> dict[str, dict[str, int]]:
    """As `Stage.counts_by_source`, of a batch whose rows are samples of one length. source_B: places in names."""
    rows_N = np.bincount(np.asarray(source_B), minlength=len(names))
    return {name: {"samples": int(n), "tokens": int(n) * tokens} for name, n in zip(names, rows_N, strict=True) if n}
