"""Real runs that are killed and started again, for `faults.py`: when to kill, and what of two runs must be the same.

A run is its work directory and, one after the other, processes that do `glmv train` in it. They are killed with
SIGKILL, which nothing in them can catch. So that a start costs little, they are forked from one that has imported what
they need and done nothing with it (`Nursery`), and compiled programs are kept. Times never count as a difference, all
other numbers do.
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
# Seconds and what is made of them: of a row of metrics.jsonl, the only numbers that two equal runs may differ in.
TIMED = re.compile(r"wall|.*_per_second|data_wait|time/.*|flop_utilisation|.*seconds.*")


NEEDED = ("glmv_jax.cli.training", "glmv_jax.train.main", "glmv_jax.train.stages.rl", "glmv_jax.rl.tasks",
          "glmv_jax.rl.rewards.system", "orbax.checkpoint", "tensorboardX")  # fmt: skip


class Nursery:
    """Starts `glmv train` again and again.   environment: variables on top of ours."""

    def __init__(self, environment: dict[str, str]) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
        command = [sys.executable, "-c", "import faulty_runs; faulty_runs.nurse()"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)

    def start(self, words: list[str], log: pathlib.Path) -> int:
        """The process that runs `glmv` with these words and writes what it says into `log`."""
        self._ask([words, str(log)])
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
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            pid, status = os.waitpid(asked, os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        words, log = asked
        if pid := os.fork():
            print(pid, flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.exit(importlib.import_module("glmv_jax.cli").main(words))


@dataclasses.dataclass
class Run:
    """A run of `spec` (an experiment file with its arguments) in `folder`, with `more` options, from a nursery.

    said: what its processes have printed so far, all of it in <folder>.log.
    """

    nursery: Nursery
    spec: str
    folder: pathlib.Path
    more: tuple[str, ...] = ()

    @property
    def log(self) -> pathlib.Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def start(self) -> int:
        """Its process."""
        return self.nursery.start(["train", "--config", self.spec, "--workdir", str(self.folder), *self.more], self.log)

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


def killed(run: Run, at: str, rng: random.Random, start: float, seconds: float = 1800) -> tuple[Fault | None, float]:
    """Starts it and kills it at a random moment of its start-up ("starting", which takes about `start` seconds), of a
    step ("training"), of writing a checkpoint ("saving") or after its last step ("ending"). The fault, None when it
    ended before, and how long its start-up took, or what is known of that."""
    pid, began, before, first = run.start(), time.monotonic(), len(run.said), run.step
    delay = rng.uniform(0.0, {"starting": start, "training": 0.5, "saving": 0.05, "ending": 2.0}[at])
    wanted, started = first + rng.randint(1, 3), False

    def due() -> bool:
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


# --- what is the same -------------------------------------------------------------------------------------------------


def differences(a: Run, b: Run, samples: bool = True) -> list[str]:
    """What differs between two finished runs that should be one: weights and state of the optimiser, bit by bit; rows
    of metrics but for times; sampled answers."""
    from glmv_jax.train.checkpoint import quiet_orbax

    wrong = []
    quiet_orbax()
    x, y = (_arrays(run) for run in (a, b))
    wrong += [f"checkpoint: {name}" for name in sorted(x.keys() | y.keys()) if x.get(name) != y.get(name)][:3]
    rows = [[{k: v for k, v in row.items() if not TIMED.fullmatch(k)} for row in run.rows] for run in (a, b)]
    if len(rows[0]) != len(rows[1]):
        wrong.append(f"metrics.jsonl: {len(rows[0])} and {len(rows[1])} rows")
    for one, other in zip(*rows):
        names = [k for k in one.keys() | other.keys() if one.get(k) != other.get(k)]
        wrong += [f"metrics.jsonl, step {one['step']}: {name}" for name in sorted(names)[:2]]
    if samples:
        written = [{p.name: p.read_bytes() for p in (run.folder / "samples").iterdir()} for run in (a, b)]
        wrong += [f"samples: {k}" for k in sorted(written[0].keys() | written[1].keys())
                  if written[0].get(k) != written[1].get(k)]  # fmt: skip
    return wrong[:6]


def _arrays(run: Run) -> dict[str, tuple]:
    """Of the last checkpoint: (dtype, shape, bytes) by path."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from glmv_jax.trees import flatten

    folder, found = run.folder / "checkpoints" / str(run.checkpoints()[-1]), {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in ("params", "training"):
            tree = reader.metadata(folder / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), tree)
            got = reader.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            found |= {f"{item}/{name}": (str(x.dtype), x.shape, x.tobytes()) for name, x in flatten(got).items()}
    return found


def accounts(run: Run, groups: int, answers: int, staleness: int) -> list[str]:
    """What is wrong with the books of a finished asynchronous run: every prompt that was drawn has to be trained on
    once, with all its answers in one step, or to wait; no token is older than `staleness`."""
    lines = (run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "sample"]
    trained: dict[int, list[dict]] = {}
    for row in rows:
        trained.setdefault(row["uid"], []).append(row)
    state = host(run)["data"]["scheduler"]
    waiting = [group["prompt"]["uid"] for group in state["groups"]]
    left_out = [row["uid"] for row in map(json.loads, lines) if row["kind"] in ("filtered", "given_up")]
    wrong = [f"prompt {uid} is trained on {len(found) / answers:g} times" for uid, found in trained.items()
             if sorted(row["member"] for row in found) != list(range(answers))]  # fmt: skip
    wrong += [f"prompt {uid}: in steps {steps}" for uid, found in trained.items()
              if len(steps := {row["step"] for row in found}) > 1]  # fmt: skip
    by_step = sorted(row["step"] for row in rows)
    if by_step != [step for step in range(run.step) for _ in range(groups * answers)]:
        wrong.append(f"{len(rows)} answers in {run.step} steps of {groups * answers}")
    if sorted([*trained, *waiting, *left_out]) != list(range(state["prompts"])):
        have = {*trained, *waiting, *left_out}
        lost = sorted(set(range(state["prompts"])) - have)
        wrong.append(f"of {state['prompts']} prompts {len(lost)} are lost: {lost[:5]}, or some are twice")
    oldest = max(row["trained_at"] - version for row in rows for version in row["versions"])
    return wrong[:6] + ([f"a token is {oldest} updates old"] if oldest > staleness else [])


def host(run: Run) -> dict[str, Any]:
    """The JSON of the last checkpoint."""
    path = run.folder / "checkpoints" / str(run.checkpoints()[-1]) / "host" / "metadata"
    return json.loads(path.read_text(encoding="utf-8"))
