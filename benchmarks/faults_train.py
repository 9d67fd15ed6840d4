"""What else can happen to training, for `faults.py train`: each case is a function that makes it happen to a real run
and returns what was wrong, an empty list when the run survived."""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from equal_runs import differences
from real_runs import ROOT, Nursery, Run, began_again, killed, left_behind

STAGES = ("mim", "siglip", "pretrain", "sft", "rl")
STEPS, SAVED = 16, 2  # that a stage takes; the step of its first checkpoint
TOY = """from tests.train.toy import config


def get_config(arg=None):
    return config(steps={steps}, save_every=4, pause={pause})
"""


def each_of(only: str, seed: int, folder: pathlib.Path, nursery: Nursery) -> Iterator[list[dict]]:
    """The faults of each case, or of each that is named, as {"run", "at", "survived", ...}."""
    from contest import log

    for name in [name for name in only.split(",") if name] or [*STAGES, *CASES]:
        if name in STAGES:
            faults = stage(name, random.Random(f"{name}/{seed}"), folder, nursery)
        else:
            wrong = CASES[name](folder, nursery)
            faults = [{"run": "toy", "at": name.replace("_", " "), "survived": not wrong, "wrong": wrong}]
        for fault in faults:
            log(f"{fault['run']}, {fault['at']}: {'; '.join(fault['wrong']) or 'survived'}")
        yield faults


def stage(name: str, rng: random.Random, folder: pathlib.Path, nursery: Nursery) -> list[dict]:
    """A stage with two data workers, killed in a step and in a save when it has a checkpoint to go on from, which lies
    in the middle of an epoch, against one that nothing disturbed."""
    arguments = f"stage={name},steps={STEPS},workers=2,cache={folder / 'cache'}"
    spec = f"{ROOT / 'benchmarks' / 'faults.py'}:{arguments}"
    whole, run = Run(nursery, spec, folder / f"{name}-whole"), Run(nursery, spec, folder / name)
    if whole.finish():
        return [{"run": name, "at": "nothing", "survived": False, "wrong": [whole.said[-500:]]}]
    faults, behind = [], []
    for at in ("training", "saving"):
        before = len(run.said)
        fault, _ = killed(run, at, rng, 0.0, saved=SAVED)
        if faults:
            began_again(run, faults[-1], before)
        if not fault:
            return [{"run": name, "at": at, "survived": False, "wrong": ["it ended before it was killed: not tried"]}]
        faults.append(fault)
        behind += left_behind(run.mark)
    before = len(run.said)
    if run.finish():
        return [{"run": name, "at": f.at, "survived": False, "wrong": [run.said[-500:]]} for f in faults]
    began_again(run, faults[-1], before)
    wrong = differences(whole, run) + [f"left behind: {command}" for command in behind]
    return [{"run": name, "at": f.at, "step": f.step, "saved": f.saved, "again": f.again, "wrong": wrong,
             "survived": f.survived and not wrong} for f in faults]  # fmt: skip


# --- cases, with the toy stage of the tests ---------------------------------------------------------------------------


def toy(
    files: pathlib.Path, nursery: Nursery, name: str, *, pause: float = 0.0, steps: int = 12, folder: Any = None, **more
) -> Run:
    """A run of it, in `folder` or files/name. With as many steps all are the same in the end.

    pause: seconds a step.   more: of `Run`.
    """
    spec = files / f"{name}.py"
    spec.write_text(TOY.format(steps=steps, pause=pause))
    return Run(nursery, str(spec), folder or files / name, **more)


def undisturbed(folder: pathlib.Path, nursery: Nursery) -> Run:
    whole = toy(folder, nursery, "toy-whole")
    if not whole.finished and whole.finish():
        raise SystemExit(f"faults: the toy stage fails: {whole.said[-1000:]}")
    return whole


def until(done: Callable[[], bool], run: Run, pid: int, seconds: float = 600) -> None:
    """Waits for something that the process `pid` does; SystemExit when it ends first."""
    end = time.monotonic() + seconds
    while not done():
        if run.ended(pid) is not None or time.monotonic() > end:
            raise SystemExit(f"faults: {run.folder.name} ended or hung: {run.said[-1000:]}")
        time.sleep(0.02)


def exit_code(run: Run, pid: int, seconds: float = 600) -> int | None:
    """Of the process, once it has ended; None when it has to be killed after these seconds."""
    end = time.monotonic() + seconds
    while (code := run.ended(pid)) is None and time.monotonic() < end:
        time.sleep(0.02)
    if code is None:
        os.kill(pid, signal.SIGKILL)
    return code


def goes_on(run: Run, whole: Run, said: str) -> list[str]:
    """What is wrong when it is started again: it has to say that, and to end as the other."""
    before = len(run.said)
    if code := run.finish():
        return [f"started again it ended with {code}: {run.said[before:][-300:]}"]
    missing = [] if re.search(said, run.said[before:]) else [f"it did not say {said!r}"]
    return missing + differences(whole, run)


def sigterm(folder: pathlib.Path, nursery: Nursery) -> list[str]:
    """Saved, 0, within 30 seconds; then it goes on from that very step."""
    run, whole = toy(folder, nursery, "toy-sigterm", pause=0.3), undisturbed(folder, nursery)
    pid = run.start()
    until(lambda: run.step >= 5, run, pid)
    os.kill(pid, signal.SIGTERM)
    sent = time.monotonic()
    code = exit_code(run, pid)
    took, saved = time.monotonic() - sent, max(run.checkpoints())
    wrong = [f"exit code {code}"] if code else []
    wrong += [f"it took {took:.1f} s"] if took > 30 else []
    wrong += [f"saved at {saved}, the last step was {run.step}"] if saved != run.step else []
    return wrong + goes_on(run, whole, f"resuming from step {saved} of 12")


def _damaged(folder: pathlib.Path, nursery: Nursery, name: str, harm: Callable[[pathlib.Path], None]) -> list[str]:
    run, whole = toy(folder, nursery, name, pause=0.3), undisturbed(folder, nursery)
    pid = run.start()
    until(lambda: len(run.checkpoints()) == 2, run, pid)
    os.kill(pid, signal.SIGKILL)
    exit_code(run, pid)
    older, newest = run.checkpoints()[-2:]
    files = [p for p in (run.folder / "checkpoints" / str(newest) / "params").rglob("*") if p.is_file()]
    harm(max(files, key=lambda path: path.stat().st_size))
    return goes_on(run, whole, rf"cannot be read \(.*\); trying the one before(.|\n)*resuming from step {older} of 12")


def torn_checkpoint(folder: pathlib.Path, nursery: Nursery) -> list[str]:
    return _damaged(folder, nursery, "toy-torn", lambda path: os.truncate(path, path.stat().st_size // 2))


def flipped_bit(folder: pathlib.Path, nursery: Nursery) -> list[str]:
    def flip(path: pathlib.Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return _damaged(folder, nursery, "toy-flipped", flip)


def _on_a_disk(
    folder: pathlib.Path, nursery: Nursery, name: str, spoil: Callable, mend: Callable, words: str
) -> list[str]:
    """A run on a small disk of its own that goes bad after the first checkpoint, and is mended afterwards."""
    disk, whole = folder / f"disk-{name}", undisturbed(folder, nursery)
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        run = toy(folder, nursery, f"toy-{name}", pause=0.5, folder=disk / "run", log=folder / f"toy-{name}.log")
        pid = run.start()
        until(lambda: bool(run.checkpoints()), run, pid)
        spoil(disk)
        code = exit_code(run, pid)
        wrong = [f"exit code {code}"] if code != 2 else []
        wrong += [] if words in run.said and "Traceback" not in run.said else [f"it said {run.said[-300:]!r}"]
        mend(disk)
        return wrong + goes_on(run, whole, "resuming from step")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def full_disk(folder: pathlib.Path, nursery: Nursery) -> list[str]:
    def fill(disk: pathlib.Path) -> None:
        with open(disk / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                return

    words = "the disk is full: make room or choose another workdir"
    return _on_a_disk(folder, nursery, "full", fill, lambda disk: (disk / "filler").unlink(), words)


def read_only_disk(folder: pathlib.Path, nursery: Nursery) -> list[str]:
    """Files that are open for writing keep a disk from becoming read-only, so only the checkpoints' folder does."""

    def freeze(disk: pathlib.Path) -> None:
        checkpoints = str(disk / "run" / "checkpoints")
        subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints, checkpoints], check=True)

    def thaw(disk: pathlib.Path) -> None:
        subprocess.run(["umount", "-l", str(disk / "run" / "checkpoints")], check=True)

    words = "the disk is read-only: choose another workdir"
    return _on_a_disk(folder, nursery, "read-only", freeze, thaw, words)


def _one_of_two(folder: pathlib.Path, nursery: Nursery, gone: int) -> list[str]:
    """Process `gone` is killed: the other one ends within a minute and says which it was; started again, both go on."""
    name = f"toy-two-{gone}"

    def both() -> list[tuple[Run, int]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            more = ("--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", "2", "--process")
        runs = [toy(folder, nursery, name, pause=0.3, steps=40, more=(*more, str(n)), log=folder / f"{name}-{n}.log")
                for n in range(2)]  # fmt: skip
        return [(run, run.start()) for run in runs]

    started = both()
    (first, pid), (other, left) = started[0], started[1 - gone]
    until(lambda: first.step >= 8, first, pid)
    os.kill(started[gone][1], signal.SIGKILL)
    began = time.monotonic()
    code = exit_code(other, left, 180)
    took = time.monotonic() - began
    wrong = [f"the other ended with {code} after {took:.0f} s"] if not code or took > 60 else []
    said = rf"glmv: process {gone} of 2 \(.*\) has ended before the run did; .*start all of them again"
    wrong += [] if re.search(said, other.said) else [f"it said {other.said[-200:]!r}"]
    exit_code(*started[gone])
    saved, before, again = max(first.checkpoints(), default=0), len(first.said), both()
    codes = [exit_code(*each) for each in again]
    wrong += [f"started again they ended with {codes}"] if codes != [0, 0] else []
    goes_on = f"resuming from step {saved} of 40" in first.said[before:]
    return wrong + ([] if goes_on else [f"it did not go on from {saved}"])


def first_of_two(folder: pathlib.Path, nursery: Nursery) -> list[str]:
    return _one_of_two(folder, nursery, 0)


def second_of_two(folder: pathlib.Path, nursery: Nursery) -> list[str]:
    return _one_of_two(folder, nursery, 1)


CASES = {case.__name__: case for case in (
    sigterm, torn_checkpoint, flipped_bit, full_disk, read_only_disk, first_of_two, second_of_two,
)}  # fmt: skip
