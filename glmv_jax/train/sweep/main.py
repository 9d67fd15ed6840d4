"""Runs a sweep, or goes on with one.

A run goes through `glmv train`, so that whatever ends it ends no other one, and what it left is resumed by the next
call. Killed outright (kill -9), this process leaves the runs under way to end by themselves.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from glmv_jax import config
from glmv_jax.config import ConfigDict
from glmv_jax.eval import report, report_sweep
from glmv_jax.eval.report_sweep import FILE
from glmv_jax.train.disk import disk_errors, write_json
from glmv_jax.train.sweep.board import Board
from glmv_jax.train.sweep.child import Child, Stopper, progress_of, train_command
from glmv_jax.train.sweep.plan import Run
from glmv_jax.typing import UserError

POLL = 0.2  # seconds between looks at the processes
_FREE = ("compilation_cache", "faults", "keep", "save_every")  # may differ between two calls: no number depends on them
_LOG = "train.log"


def run(
    experiment: str, cfg: ConfigDict, overrides: Sequence[str], runs: list[Run], workdir: Path, jobs: int = 1
) -> int:
    """Runs what is not finished yet, `jobs` at a time, and reports. Returns 0, 1 when a run failed, 130 when stopped.

    experiment, overrides: what all runs share, as the command line has it; cfg: the config that they make.
    Raises: UserError as `check`, and for a disk that cannot be written.
    """
    check(workdir, cfg, jobs)
    others = _remember(runs, workdir)
    todo = [each for each in runs if each.status != "finished"]
    file = {"config": experiment, "overrides": list(overrides), "base": config.flat(cfg)}

    def save() -> None:
        write_json(workdir / FILE, file | {"runs": [*others, *(each.record() for each in runs)]})

    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    save()
    board = Board(runs, workdir, jobs)
    if len(todo) < len(runs):
        board.say(f"{len(runs) - len(todo)} of {len(runs)} runs are already finished")
    with contextlib.closing(board), Stopper(board.say) as stopper:
        _run_all(experiment, overrides, todo, workdir, jobs, board, stopper, save)
    if stopper.number:
        finished = sum(each.status == "finished" for each in runs)
        board.say(f"stopped; {finished} of {len(runs)} runs are finished, the same command goes on from here")
        return 130

    file["results"] = report_sweep.summary(report_sweep.read(workdir))
    save()
    report.show(workdir)
    board.say(f"report: {report.write(workdir)}")
    failed = [each for each in runs if each.status != "finished"]
    for each in failed:
        board.say(f"{each.name} {each.status}: {each.error} (all of it in {workdir / each.name / _LOG})")
    if failed:
        board.say(f"{len(failed)} of {len(runs)} runs did not finish; the same command tries them again")
    return 1 if failed else 0


def check(workdir: Path, cfg: ConfigDict, jobs: int) -> None:
    """Raises UserError when a sweep cannot be run there: another config's, a single run's, or too many at a time."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs} runs nothing; give a number from 1 on")
    if jobs > 1 and has_tpu():
        raise UserError(f"--jobs {jobs}: one process at a time can hold this machine's TPU chips; give --jobs 1")
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir} is the work directory of a single run; give another folder")
    if not (workdir / FILE).exists():
        return
    before, now = read_file(workdir).get("base", {}), json.loads(json.dumps(config.flat(cfg)))
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k not in _FREE]
    if changed:
        shown = ", ".join(f"{k}: {before.get(k)} -> {now.get(k)}" for k in changed[:3])
        raise UserError(
            f"--workdir {workdir} holds a sweep of another config ({shown}{' ...' if len(changed) > 3 else ''}); give "
            "another folder, or the config that it began with"
        )


def read_file(workdir: Path) -> dict[str, Any]:
    """sweep.json of a sweep that was begun; UserError when it cannot be read."""
    try:
        return json.loads((workdir / FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{workdir / FILE} cannot be read ({error}); restore it, or give another --workdir") from None


def has_tpu(dev: str | Path = "/dev") -> bool:
    """Whether this machine has TPU chips that jax would take, looked up without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms or importlib.util.find_spec("libtpu") is None:
        return False
    return any(itertools.chain(Path(dev).glob("accel[0-9]*"), Path(dev).glob("vfio/[0-9]*")))


def _remember(runs: Sequence[Run], workdir: Path) -> list[dict[str, Any]]:
    """Gives the runs what earlier calls left of them: their state by their own folders, time and memory by sweep.json.

    Returns the records of runs that earlier calls had and this one has not (other seeds, say): they stay in the report.
    """
    records = read_file(workdir).get("runs", ()) if (workdir / FILE).exists() else ()
    before = {record["name"]: record for record in records}
    for each in runs:
        record = before.pop(each.name, {})
        each.seconds, each.peak_rss = record.get("seconds", 0.0), record.get("peak_rss", 0)
        each.status = "finished" if (workdir / each.name / "results.json").exists() else "waiting"
    return list(before.values())


def _run_all(
    experiment: str, overrides: Sequence[str], todo: Sequence[Run], workdir: Path, jobs: int, board: Board,
    stopper: Stopper, save: Callable[[], None],
) -> None:  # fmt: skip
    """Keeps `jobs` processes busy until there is nothing left to do or a signal has come."""
    waiting, active = collections.deque(todo), stopper.children
    while active or waiting and not stopper.number:
        while waiting and len(active) < jobs and not stopper.number:
            each = waiting.popleft()
            folder = workdir / each.name
            board.begin(each)
            active[each.name] = Child(folder / _LOG, experiment, folder, [*overrides, *each.overrides])
            each.status = "running"
            save()
        for each in [each for each in todo if each.name in active and active[each.name].poll()]:
            child = active.pop(each.name)
            _ended(each, child, workdir, stopping=bool(stopper.number))
            board.end(each, child.seconds)
            save()
        board.update({name: child.seconds for name, child in active.items()})
        time.sleep(POLL)


def _ended(each: Run, child: Child, workdir: Path, *, stopping: bool) -> None:
    """What has become of a run whose process is over."""
    each.exit_code = code = child.exit_code
    each.seconds += child.seconds
    each.peak_rss, each.error = max(each.peak_rss, child.peak_rss), ""
    if code == 0 and (workdir / each.name / "results.json").exists():
        each.status = "finished"
    elif code == 130 or code < 0 and stopping:
        each.status, each.error = "interrupted", "stopped by a signal"
    else:
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        each.status, each.error = "failed", f"{how}: {child.last_words()}"


def dry_run(experiment: str, overrides: Sequence[str], runs: list[Run], workdir: Path) -> Iterator[str]:
    """What `run` would do, a line a run: its state and its command."""
    _remember(runs, workdir)
    for each in runs:
        step = progress_of(workdir / each.name)[0]
        state = each.status if each.status == "finished" else f"from about step {step}" if step else "new"
        command = ["glmv", *train_command(experiment, workdir / each.name, [*overrides, *each.overrides])[3:]]
        yield f"{each.name} ({state}): {' '.join(command)}"
