"""Does stage 5 lose anything when processes of its roles are killed, and the trainer too?

    python benchmarks/rl_ray_train.py [--steps 10] [--kills 6] [--seed 0] [--out FILE]

The stage 5 of `faults.py` (nano towers of one layer, a rule in a reward system, the inference engine, questions and
episodes in drawn windows, a checkpoint every other step), with two rollout workers, a reward worker and an environment
worker in processes of a local Ray cluster. While it trains, one of them after the other is killed with SIGKILL, each
role in its turn; then the trainer, whose processes have to go with it; and the same command goes on to the end. Needs
Ray (`pip install 'glmv_jax[rl]'`). 15 minutes on two cores, most of it processes that start.

Prints one JSON line: prompts trained on, what is wrong with the books (every prompt that was drawn is trained on once,
with all its answers in one step, or waits; no token is too old; none may be), processes that were killed, how often
work was done again, answers that failed with them, the largest difference between a sampled log-probability and the
trainer's in steps whose tokens are all of the newest weights (the first, for one), and how much of the time stages of
the pipeline overlapped. Exits with 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

PARTS = {"rollout": 2, "reward": 1, "environment": 1}
TURNS = ["rollout", "reward", "environment", "rollout"]
EPISODES = {"rollout.environments": (("windows", 6.0),), "rollout.episodes.turns": 2, "rollout.episodes.rows": 6,
            "data.tokens": 768, "data.patches": 192, "data.targets": 96}  # fmt: skip
NEW = 6  # answers that are kept between two kills


def options() -> list[str]:
    values = EPISODES | {f"rollout.workers.{role}": count for role, count in PARTS.items()}
    return [f"--config.{name}={value}" for name, value in values.items()]


def children(of: int) -> dict[int, str]:
    """The processes of roles below one, and what they are called: those that they have forked are called so, too."""
    parents, called = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            called[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace").rstrip("\0")
        except OSError:
            continue  # it has ended

    def below(pid: int) -> bool:
        return pid == of or pid in parents and below(parents[pid])

    names = tuple(f"ray::{role.title()}" for role in PARTS)
    return {pid: name for pid, name in called.items() if name.startswith(names) and below(pid)}


def is_worker(pid: int, among: dict[int, str]) -> bool:
    """Whether it is the process of a role, and none that this one has forked."""
    parent = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return parent not in among


def kept(run) -> list[dict]:
    path = run.folder / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def until(run, pid: int, answers: int, seconds: float = 900) -> None:
    """So many answers are kept."""
    end = time.monotonic() + seconds
    while sum(row["kind"] == "sample" for row in kept(run)) < answers:
        if run.ended(pid) is not None or time.monotonic() > end:
            raise SystemExit(f"rl_ray_train: {run.folder.name} ended or hangs: {run.said[-2000:]}")
        time.sleep(0.1)


def kill_roles(run, pid: int, kills: int, rng: random.Random) -> collections.Counter[str]:
    """Kills processes of its roles as it trains; how many of each."""
    from contest import log

    killed: collections.Counter[str] = collections.Counter()
    answers = NEW
    for n in range(kills):
        until(run, pid, answers)
        role = TURNS[n % len(TURNS)]
        below = children(pid)
        named = [one for one, name in below.items() if name.startswith(f"ray::{role.title()}")]
        there = [one for one in named if is_worker(one, below)]
        if there:
            os.kill(rng.choice(sorted(there)), signal.SIGKILL)
            killed[role] += 1
            log(f"{n + 1}. a {role} worker is killed at step {run.step}")
        answers = sum(row["kind"] == "sample" for row in kept(run)) + NEW
    until(run, pid, answers)
    return killed


def kill_trainer(run, pid: int) -> list[str]:
    """What is there of its roles' processes a minute later (Ray's own agents take longer)."""
    below = children(pid)
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while (left := [name for one, name in below.items() if alive(one)]) and time.monotonic() < end:
        time.sleep(0.5)
    return left


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended may wait for somebody to ask how."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def found(run, lost: dict[str, float]) -> dict:
    """What a finished run says. lost: what its first attempt has said of its workers."""
    import faults
    from equal_runs import accounts

    rows, steps = kept(run), [row for row in run.rows if row["kind"] == "train"]
    samples = [row for row in rows if row["kind"] == "sample"]
    drawn = [[v for v in row["versions"] if v >= 0] for row in samples]
    return {
        "steps": run.step, "prompts": len({row["uid"] for row in samples}),
        "episodes": len({row["uid"] for row in samples if row["source"] == "windows"}),
        "wrong": accounts(run, faults.GROUPS, faults.ANSWERS, faults.STALENESS),
        "fell": sum(versions != sorted(versions) for versions in drawn),
        "workers": lost, "failed": sum(row["kind"] == "failed" for row in rows),
        "mismatch_gap_of_no_age": max(row["mismatch_gap_max"] for row in steps if not row["staleness_max/mean"]),
        "overlap": json.loads((run.folder / "trace.json").read_text())["otherData"]["overlap"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kills", type=int, default=6, help="of processes of roles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help="folder for the run, kept (default: a temporary one)")
    parser.add_argument("--out")
    given = parser.parse_args()
    import faults
    from contest import emit, environment
    from real_runs import Nursery, Run

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    nursery = Nursery({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore",
                       "RAY_AUTH_MODE": "disabled"})  # fmt: skip
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(given.work or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        spec = f"{pathlib.Path(faults.__file__).resolve()}:form=async,cache={folder / 'cache'},steps={given.steps}"
        run = Run(nursery, spec, folder / "run", tuple(options()))
        pid = run.start()
        killed = kill_roles(run, pid, given.kills, random.Random(given.seed))
        before, first = run.step, [row for row in run.rows if row["kind"] == "train"]
        left = kill_trainer(run, pid)
        if code := run.finish():
            raise SystemExit(f"rl_ray_train: the run ended with {code}: {run.said[-2000:]}")
        lost = {name[8:]: value for name, value in first[-1].items() if name.startswith("workers/")}
        facts = found(run, lost)
    nursery.close()
    emit({"benchmark": "rl_ray_train", **facts, "killed": dict(killed), "trainer_killed_at": before, "left": left,
          "seconds": round(time.monotonic() - began), "environment": environment()}, given.out)  # fmt: skip
    whole = not facts["wrong"] and not facts["fell"] and not left and facts["steps"] == given.steps
    return 0 if whole and facts["mismatch_gap_of_no_age"] < 1e-4 and set(killed) == set(PARTS) else 1


if __name__ == "__main__":
    sys.exit(main())
