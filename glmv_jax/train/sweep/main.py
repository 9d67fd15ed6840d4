"""Runs a sweep, or goes on with one.

A run goes through `glmv train`, here or elsewhere (see `launchers`), so that whatever ends it ends no other one, and
what it left is resumed by the next call. Killed outright (kill -9), this process leaves the runs under way to end by
themselves.
"""

from __future__ import annotations

import collections
import contextlib
import json
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
from glmv_jax.train.sweep.child import Child, Stopper, last_lines, progress_of
from glmv_jax.train.sweep.launchers import Launcher
from glmv_jax.train.sweep.plan import Run
from glmv_jax.train.sweep.remote import RemoteError
from glmv_jax.typing import UserError

POLL = 0.2  # seconds between looks at the processes
SHOWN = 10  # last lines of a run that failed
_FREE = ("compilation_cache", "faults", "keep", "save_every")  # may differ between two calls: no number depends on them
_LOG = "train.log"


def run(cfg: ConfigDict, runs: list[Run], launcher: Launcher) -> int:
    """Runs what is not finished yet and reports. Returns 0, 1 when a run failed, 130 when stopped.

    cfg: the config that all runs share, overrides of the command line included.
    Raises: UserError as `check`, and for a disk that cannot be written.
    """
    workdir = launcher.shared.workdir
    check(workdir, cfg, launcher)
    others = _remember(runs, workdir)
    todo = [each for each in runs if each.status != "finished"]
    file = {
        "config": launcher.shared.experiment, "overrides": list(launcher.shared.overrides), "base": config.flat(cfg),
        "launcher": launcher.name, "identity": launcher.identity,
    }  # fmt: skip

    def save() -> None:
        write_json(workdir / FILE, file | {"runs": [*others, *(each.record() for each in runs)]})

    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    save()
    board = Board(runs, workdir, launcher.jobs)
    if len(todo) < len(runs):
        board.say(f"{len(runs) - len(todo)} of {len(runs)} runs are already finished")
    with contextlib.closing(board), Stopper(board.say) as stopper:
        if todo:
            _prepare(launcher, board)
        _run_all(todo, launcher, board, stopper, save)
    if stopper.number:
        return _stopped(runs, launcher, board)

    file["results"] = report_sweep.summary(report_sweep.read(workdir))
    save()
    report.show(workdir)
    board.say(f"report: {report.write(workdir)}")
    return _failures(runs, workdir, board)


def check(workdir: Path, cfg: ConfigDict, launcher: Launcher) -> None:
    """Raises UserError when a sweep cannot be run there: another config's, another launcher's, a single run's, or more
    than the launcher can do."""
    launcher.check()
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir} is the work directory of a single run; give another folder")
    if not (workdir / FILE).exists():
        return
    file = read_file(workdir)
    if (before := file.get("launcher", "local")) != launcher.name:
        raise UserError(
            f"--workdir {workdir} holds a sweep of --launcher {before}, whose checkpoints --launcher {launcher.name} "
            "does not see; give that one, or another folder"
        )
    before, now = file.get("base", {}), json.loads(json.dumps(config.flat(cfg)))
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


def identity(workdir: Path) -> str | None:
    """What the sweep's machines and folders elsewhere are called, None where it has none yet."""
    return read_file(workdir).get("identity") if (workdir / FILE).exists() else None


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


def _prepare(launcher: Launcher, board: Board) -> None:
    try:
        launcher.prepare(board.say)
    except RemoteError as error:
        raise UserError(f"the sweep cannot begin: {error}") from None


def _run_all(todo: Sequence[Run], launcher: Launcher, board: Board, stopper: Stopper, save: Callable[[], None]) -> None:
    """Keeps `jobs` processes busy until there is nothing left to do or a signal has come."""
    waiting, active = collections.deque(todo), stopper.children
    places: dict[str, int] = {}  # of the processes under way, each its own of `jobs`
    while active or waiting and not stopper.number:
        while waiting and len(active) < launcher.jobs and not stopper.number:
            each = waiting.popleft()
            board.begin(each)
            places[each.name] = place = min(set(range(len(places) + 1)) - set(places.values()))
            log = launcher.shared.folder(each) / _LOG
            active[each.name] = Child(log, launcher.command(each), environment=launcher.environment(place))
            each.status = "running"
            save()
        for each in [each for each in todo if each.name in active and active[each.name].poll()]:
            child = active.pop(each.name)
            del places[each.name]
            _ended(each, child, launcher, stopping=bool(stopper.number))
            board.end(each, child.seconds)
            save()
        board.update({name: child.seconds for name, child in active.items()})
        time.sleep(POLL)


def _ended(each: Run, child: Child, launcher: Launcher, *, stopping: bool) -> None:
    """What has become of a run whose process is over."""
    each.exit_code = code = child.exit_code
    each.seconds += child.seconds
    each.error = ""
    if not launcher.remote:  # else it is the memory of the process that looked
        each.peak_rss = max(each.peak_rss, child.peak_rss)
    if code == 0 and (launcher.shared.folder(each) / "results.json").exists():
        each.status = "finished"
    elif code in (0, 130) or code < 0 and stopping:  # 0: SIGTERM, after a checkpoint
        each.status, each.error = "interrupted", "stopped by a signal"
    else:
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        each.status, each.error = "failed", f"{how}: {child.last_words()}"


def _stopped(runs: Sequence[Run], launcher: Launcher, board: Board) -> int:
    finished = sum(each.status == "finished" for each in runs)
    for each in runs:
        if each.status == "interrupted" and (left := launcher.left(each)):
            board.say(f"{each.name}: {left}")
    board.say(f"stopped; {finished} of {len(runs)} runs are finished, the same command goes on from here")
    return 130


def _failures(runs: Sequence[Run], workdir: Path, board: Board) -> int:
    """Says of each run that failed how its log ends. Returns the exit code."""
    failed = [each for each in runs if each.status != "finished"]
    for each in failed:
        log = workdir / each.name / _LOG
        board.say(f"{each.name} {each.status}: {each.error} (all of it in {log})")
        for line in last_lines(log, SHOWN):
            board.say(f"  | {line}")
    if failed:
        board.say(f"{len(failed)} of {len(runs)} runs did not finish; the same command tries them again")
    return 1 if failed else 0


def dry_run(runs: list[Run], launcher: Launcher) -> Iterator[str]:
    """What `run` would do: the state of every run, and its commands."""
    _remember(runs, launcher.shared.workdir)
    yield from launcher.would_prepare()
    for each in runs:
        step = progress_of(launcher.shared.folder(each))[0]
        state = each.status if each.status == "finished" else f"from about step {step}" if step else "new"
        commands = launcher.would(each)
        if not launcher.remote:
            yield f"{each.name} ({state}): {commands[0]}"
        else:
            yield f"# {each.name} ({state})"
            yield from commands if state != "finished" else ()
