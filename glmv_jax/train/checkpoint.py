"""Checkpoints: saved beside the training, atomic, checked before they are believed, restorable on other devices.

A checkpoint is `checkpoints/<step>/` with three Orbax items, `params`, `training` (step, optimiser state, extra) and
`host` (JSON: position of the data, time and counts so far), and checksums.json. Orbax writes into a temporary folder
and renames it, so a killed save leaves nothing that looks like a checkpoint. What it does not notice is a flipped byte
in the data of an array, hence the checksums (a CRC a file, made in the background just before that rename).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from glmv_jax.config import ConfigDict, unflat
from glmv_jax.parallel import multihost
from glmv_jax.train.disk import SUMS, damage, disk_errors, seal, size_text
from glmv_jax.train.state import TrainState
from glmv_jax.trees import flatten, inside, nest, replaced
from glmv_jax.typing import Params, UserError

SLOW = 5.0  # seconds that training may wait for the disk before that is said


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: `<workdir>/checkpoints`; made when missing.
      keep: how many to keep, at least 1.
      report: gets each line that the person should read.

    Raises: UserError when the folder cannot be written (a file is in the way, read-only, full disk), here and in `save`
      and `wait`, naming the path and what to do.
    """

    def __init__(self, folder: Path, keep: int = 2, report: Callable[[str], None] = print) -> None:
        self.folder, self.keep, self.report = Path(folder).absolute(), max(1, keep), report
        self._waited = SLOW / 2  # seconds, the longest so far that was said
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        seal = ocp.AsyncOptions(post_finalization_callback=self._seal)
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, cleanup_tmp_directories=True, async_options=seal
            ),
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def check_space(self, state: TrainState) -> None:
        """UserError when the disk has no room for the checkpoints that will be kept and the one being written."""
        need = (self.keep + 1) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(
                f"{self.folder}: checkpoints will take {size_text(need)} and the disk has {size_text(free)} left; "
                "make room, choose another workdir, or keep fewer (keep=1)"
            )

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Starts writing; returns as soon as `state` has been copied, so that the next step may take its memory.

        host: what JSON can hold. A failure of the save before this one is raised here.
        """
        training = {"step": state.step, "opt_state": state.opt_state, "extra": state.extra}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            training=ocp.args.StandardSave(training),
            host=ocp.args.JsonSave(host),
        )
        began = time.monotonic()
        with disk_errors(self.folder):
            self._manager.wait_until_finished()  # as Orbax would
            self._tell_slow(time.monotonic() - began)
            # Where Orbax could make no folder, its threads would wait for one, minutes, and the process for them.
            tempfile.TemporaryFile(dir=self.folder).close()
            if not self._manager.save(step, args=items, force=True):
                raise RuntimeError(f"{self.folder}: step {step} was not saved, newest is {self._manager.latest_step()}")

    def _tell_slow(self, seconds: float) -> None:
        """Says how long a save had to wait for the one before, and again when that has doubled."""
        if seconds >= 2 * self._waited:
            self._waited = seconds
            self.report(
                f"{self.folder}: a slow disk: training waited {seconds:.1f} s for the checkpoint before to be written; "
                "save less often (save_every) or choose a faster disk for the workdir"
            )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with disk_errors(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, and ends the background threads. Reports a failed save and raises nothing: `wait` does that."""
        try:
            self._manager.close()
        except Exception as error:  # called on the way out of another error, which must not be replaced by this one
            self.report(f"{self.folder}: the last save failed: {_first_line(error)}")

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, as (state, host); None when there is none at all.

        Args: abstract: shapes with shardings: arrays are put there, whatever number of devices saved them.

        A damaged checkpoint is reported on one line and moved to `<workdir>/unreadable/`, and the one before is used.
        Raises: UserError when none can be read, and when a good one belongs to another model or optimiser.
        """
        found = self.steps()
        for step in reversed(found):
            problem = damage(self.folder / str(step))
            if problem is None:
                try:
                    self._check_shapes(step, abstract)
                    return self._read(step, abstract)
                except UserError:
                    raise
                except Exception as error:  # Orbax and tensorstore have no type of their own for a broken file
                    problem = _first_line(error)
            self.report(f"checkpoint {self.folder / str(step)} cannot be read ({problem}); trying the one before")
            self._set_aside(step)
        if found:
            raise UserError(
                f"{self.folder}: none of {len(found)} checkpoints can be read; they are now in "
                f"{self.folder.parent / 'unreadable'}, run again to start this stage anew"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        training = {"step": abstract.step, "opt_state": abstract.opt_state, "extra": abstract.extra}
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            training=ocp.args.StandardRestore(training),
            host=ocp.args.JsonRestore(),
        )
        got = self._manager.restore(step, args=items)
        return TrainState(params=got["params"], **got["training"]), got["host"]

    def _check_shapes(self, step: int, abstract: TrainState) -> None:
        want = _table({"params": abstract.params, "opt_state": abstract.opt_state, "extra": abstract.extra})
        saved = _metadata(self.folder / str(step) / "training")
        have = _table({"params": _metadata(self.folder / str(step) / "params"), **saved})
        have.pop("step")
        wrong = _mismatch(want, have)
        if wrong:
            raise UserError(
                f"{self.folder / str(step)} belongs to another model or optimiser: {wrong}; "
                "use the config it was made with, or another workdir"
            )

    def _seal(self) -> None:
        """Adds the checksums. Runs in Orbax's thread when all is written, before the rename that makes it count."""
        if jax.process_index() == 0:
            for folder in self.folder.iterdir():
                if folder.is_dir() and not (folder / SUMS).exists():
                    seal(folder, leave_out=("_CHECKPOINT_METADATA",))  # Orbax writes the time of the commit there

    def _set_aside(self, step: int) -> None:
        target = self.folder.parent / "unreadable" / str(step)
        with disk_errors(target):
            if multihost.is_first():
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(self.folder / str(step), target)
            multihost.agreed(True)  # nobody looks before it is gone
            self._manager.close()
            self._manager = self._open()


def load_params(
    run_dir: str | Path, subtrees: Sequence[str] = (), like: Params | None = None, *, finished: bool = True
) -> Params:
    """The parameters of another run, from its newest checkpoint that is whole.

    Args:
      run_dir: the run's workdir.
      subtrees: slash paths such as "vision" or "decoder/blocks" to take; all when empty.
      like: the tree the result should have, of arrays: those that are taken are replaced, on the devices where they
        are, the others are handed through. Where all are taken, shapes with shardings do. None: the saved tree (what is
        taken of it), as numpy arrays.
      finished: refuse a run that has no results.json yet.

    Raises: UserError when there is no such run, it has not finished, nothing can be read, a subtree is missing, or
      shapes differ (names the path and both shapes).
    """
    return load_item(newest(run_dir, finished=finished) / "params", subtrees, like)


def newest(run_dir: str | Path, *, finished: bool = True) -> Path:
    """The folder of a run's newest checkpoint that is whole; its name is the step.

    Raises: UserError when there is no such run, nothing can be read, or, with `finished`, it has not finished.
    """
    run_dir = Path(run_dir).absolute()
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        inside = sorted(str(path.parent) for path in run_dir.glob("*/checkpoints"))
        remedy = f"give one of those in it: {', '.join(inside)}" if inside else "train that stage first"
        raise UserError(f"{run_dir} is no run: it has no checkpoints folder; {remedy}")
    if finished and not (run_dir / "results.json").exists():
        raise UserError(f"{run_dir} has not finished (it has no results.json); run its stage again, it will resume")
    problem = "it has no checkpoint"
    # By hand, not by a manager: that would clean up behind a run that is still going.
    for step in sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True):
        problem = damage(folder / str(step))
        if problem is None:
            return folder / str(step)
    raise UserError(f"{run_dir}: its parameters cannot be read ({problem}); train that stage again")


def load_config(run_dir: str | Path) -> ConfigDict:
    """The config another run was made with, lists as tuples; UserError when there is no such run."""
    path = Path(run_dir) / "config.json"
    try:
        return unflat({key: _tuples(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()})
    except FileNotFoundError as error:
        raise UserError(f"{run_dir} is no run: it has no config.json; train that stage first") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); train that stage again") from error


def load_item(path: Path, subtrees: Sequence[str] = (), like: Params | None = None) -> Params:
    """The tree in `<checkpoint>/params`; arguments and errors as for `load_params`."""
    saved = _metadata(path)
    chosen = taken(path, flatten(saved), subtrees, like)
    wanted = chosen if like is None else inside(flatten(like), subtrees)
    item = nest({n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in wanted.items()})
    args = jax.tree.map(_restore_arg, nest(wanted))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        got = reader.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True))
    return got if like is None else replaced(like, flatten(got))


def taken(
    source: str | Path, saved: dict[str, Any], subtrees: Sequence[str], like: Params | None
) -> dict[str, Any]:
    """Of the arrays `saved` in `source`, by slash path, those in the subtrees; UserError when a subtree is missing or
    what `like` has there differs."""
    chosen = inside(saved, subtrees)
    for subtree in subtrees:
        if not inside(chosen, [subtree]):
            have = sorted({name.partition("/")[0] for name in saved})
            raise UserError(f"{source} has no subtree {subtree!r}; it has {', '.join(have)}")
    if like is not None and (wrong := _mismatch(inside(_table(like), subtrees), _table(chosen))):
        raise UserError(f"{source} does not fit this model: {wrong}; use the size it was trained with")
    return chosen


def _restore_arg(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.Sharding):
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)


def _metadata(item: Path) -> Any:
    """The tree of an item with shapes and dtypes at its leaves; reads no array."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        meta = reader.metadata(item).item_metadata
    return meta.tree


def _table(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}


def _mismatch(want: dict[str, tuple], have: dict[str, tuple]) -> str:
    """The first differences between two tables of shapes, in words; "" when there are none."""
    wrong = [f"{n} is {have[n]} there and {want[n]} here" for n in want if n in have and have[n] != want[n]]
    wrong += [f"{n} is only here" for n in want if n not in have]
    wrong += [f"{n} is only there" for n in have if n not in want]
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def quiet_orbax() -> None:
    """Orbax tells through absl about things that are as they should be, and prints errors that it raises as well; when
    the disk is full, asyncio prints the siblings of the error that it raised."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
