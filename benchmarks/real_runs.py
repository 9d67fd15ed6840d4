"""Real runs that are killed and started again, for `faults.py`: how, and when.

A run is its work directory and, one after the other, processes that do `glmv train` in it. They are killed with
SIGKILL, which nothing in them can catch. So that a start costs little, they are forked from one that has imported what
they need and done nothing with it (`Nursery`), and compiled programs are kept.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
POLL = 0.003


NEEDED = ("glmv_jax.cli.training", "glmv_jax.train.main", "glmv_jax.train.stages.rl", "glmv_jax.rl.tasks",
          "glmv_jax.rl.rewards.system", "orbax.checkpoint", "tensorboardX")  # fmt: skip


class Nursery:
    """Starts `glmv train` again and again.   environment: variables on top of ours."""

    def __init__(self, environment: dict[str, str]) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
        command = [sys.executable, "-c", "import real_runs; real_runs.nurse()"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)

    def start(self, words: list[str], log: pathlib.Path, mark: str) -> int:
        """The process that runs `glmv` with these words and writes what it says into `log`. mark: NAME=VALUE, for the
        environment of what it starts."""
        self._ask([words, str(log), mark])
        return int(self._process.stdout.readline())

    def ended(self, pid: int) -> int | None:
        """The exit code of the process, minus the signal that killed it; None while it runs."""
        self._ask(pid)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, what: object) -> None:
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()


def nurse() -> None:
    """The process of a nursery."""
    for name in NEEDED:
        importlib.import_module(name)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            if asked not in codes:
                pid, status = os.waitpid(asked, os.WNOHANG)
                codes |= {pid: os.waitstatus_to_exitcode(status)} if pid else {}
            print(json.dumps(codes.get(asked)), flush=True)
            continue
        words, log, mark = asked
        if pid := os.fork():
            print(pid, flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        name, _, value = mark.partition("=")
        os.environ[name] = value
        sys.exit(importlib.import_module("glmv_jax.cli").main(words))


@dataclasses.dataclass
class Run:
    """A run of `spec` (an experiment file with its arguments) in `folder`, with `more` options, from a nursery.

    log: where its processes write what they say, by default <folder>.log.   said: that.
    """

    nursery: Nursery
    spec: str
    folder: pathlib.Path
    more: tuple[str, ...] = ()
    log: pathlib.Path | None = None

    def __post_init__(self) -> None:
        self.log = self.log or self.folder.with_name(self.folder.name + ".log")

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def mark(self) -> str:
        """What its processes, and those that they start, have in their environment."""
        return f"FAULTS_RUN={self.folder}"

    def start(self) -> int:
        """Its process."""
        words = ["train", "--config", self.spec, "--workdir", str(self.folder), *self.more]
        return self.nursery.start(words, self.log, self.mark)

    def ended(self, pid: int) -> int | None:
        return self.nursery.ended(pid)

    def finish(self, seconds: float = 1800) -> int:
        """Runs until it ends: its exit code."""
        pid, end = self.start(), time.monotonic() + seconds
        while (code := self.ended(pid)) is None:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"{self.folder.name} hangs: {self.said[-300:]}")
            time.sleep(0.05)
        return code

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, as far as it has been written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    @property
    def step(self) -> int:
        """The last that has a row; 0 for none."""
        return max((row["step"] for row in self.rows), default=0)

    def checkpoints(self) -> list[int]:
        """Steps of those that are complete."""
        folder = self.folder / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []

    def saving(self) -> bool:
        """Whether one is being written at this moment."""
        folder = self.folder / "checkpoints"
        try:
            return any("tmp" in path.name for path in folder.iterdir())
        except FileNotFoundError:
            return False

    @property
    def finished(self) -> bool:
        return (self.folder / "results.json").exists()


def left_behind(mark: str, seconds: float = 15) -> list[str]:
    """Commands of the processes that hold `mark` in their environment and are still there after a while."""
    end = time.monotonic() + seconds
    while (found := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def _marked(mark: str) -> list[str]:
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:100])
        except OSError:  # it has ended, or is not ours
            continue
    return found


# --- kills ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fault:
    """A kill.   at: what the run was doing.   step: its last row.   saved: its newest complete checkpoint, 0 for none.
    again: the step that its next start went on from, None before that."""

    at: str
    step: int
    saved: int
    again: int | None = None

    @property
    def survived(self) -> bool:
        return self.again == self.saved


def killed(
    run: Run, at: str, rng: random.Random, start: float, seconds: float = 1800, saved: int = 0
) -> tuple[Fault | None, float]:
    """Starts it and kills it at a random moment of its start-up ("starting", which takes about `start` seconds), of a
    step ("training"), of writing a checkpoint ("saving") or after its last step ("ending"), and not before it has the
    checkpoint of step `saved`. The fault, None when it ended before, and how long its start-up took, or what is known
    of that."""
    pid, began, before, first = run.start(), time.monotonic(), len(run.said), run.step
    delay = rng.uniform(0.0, {"starting": start, "training": 0.5, "saving": 0.05, "ending": 2.0}[at])
    wanted, started = first + rng.randint(1, 3), False

    def due() -> bool:
        if saved > max(run.checkpoints(), default=0):
            return False
        if at == "starting":
            return True
        if at == "training":
            return run.step >= wanted and not run.saving()
        if at == "saving":
            return run.saving()
        return "evaluating after training" in run.said[before:]

    left_over = run.saving()  # by the kill before; a start removes it
    while (code := run.ended(pid)) is None and (left_over or not due()):
        left_over = left_over and run.saving()
        if not started and run.step > first:
            started, start = True, time.monotonic() - began
        if time.monotonic() - began > seconds:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"{run.folder.name} hangs: {run.said[-300:]}")
        time.sleep(POLL if at == "saving" else 0.02)
    time.sleep(delay)
    if code is None and (code := run.ended(pid)) is None:
        os.kill(pid, signal.SIGKILL)
        while (code := run.ended(pid)) is None:
            time.sleep(POLL)
    if code != -signal.SIGKILL:
        return None, start
    return Fault(at, run.step, max(run.checkpoints(), default=0)), start


def began_again(run: Run, fault: Fault, before: int) -> None:
    """Notes where a start, whose words begin at `before`, went on from."""
    said = run.said[before:]
    if found := re.search(r"resuming from step (\d+) of|already finished \((\d+) steps", said):
        fault.again = int(found[1] or found[2])
    elif re.search(r"parameters, \d+ steps", said):
        fault.again = 0
