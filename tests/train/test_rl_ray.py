"""`glmv train` of stage 5 with its roles in processes of a real local Ray cluster, some of which are killed: it trains
on the answers of a run in one process, on each once.

Where Ray is installed (pip install 'glmv_jax[rl]'), which is not what `dev` brings: elsewhere test_rl_workers has the
same over a stand-in. Not covered: clusters of several machines, and devices of an actor's own.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

RUNS = "here", "there"
EXPERIMENT = '''
from glmv_jax import config


def get_config(arg=None):
    cfg = config.load("experiments/rl_grpo.py:size=nano")
    rule = {"kind": "rule", "rule": "tests.rl.rewards.hostile:parity"}
    sources = {name: {"parts": {"rule": rule}} for name, weight in cfg.data.weights.items() if weight}
    cfg.rewards = {"workers": 1, "sources": sources}
    cfg.model.vision.depth = cfg.model.decoder.depth = 1
    cfg.rollout.update(prompts=6, group=4, slots=8, max_new_tokens=6, rows=(3,), pipeline="async", staleness=0)
    cfg.data.ahead = 0
    cfg.eval.update(documents=2, questions=2, few=2, batch=4, shown=1)
    cfg.update(steps=4, save_every=2, log_every=1)
    return cfg
'''


def start(folder: Path, name: str, *more: str) -> subprocess.Popen:
    (folder / "experiment.py").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "glmv_jax.cli", "train", "--config", str(folder / "experiment.py")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "disabled", "XLA_FLAGS": ""}
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(
            [*command, "--workdir", str(folder / name), *more], stdout=log, stderr=subprocess.STDOUT, env=env,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip


def rows(run: Path, file: str) -> list[dict]:
    path = run / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def processes(of: int, name: str) -> list[int]:
    """Those of Ray that a run has started and that are called so; what they have forked is called so, too."""
    stat = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            stat[int(path.name)] = int(fields[1]), (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it has ended

    def below(pid: int) -> bool:
        return pid == of or pid in stat and below(stat[pid][0])

    found = {pid for pid, (_, line) in stat.items() if line.startswith(f"ray::{name}") and below(pid)}
    return sorted(pid for pid in found if stat[pid][0] not in found)


def killed(folder: Path, run: subprocess.Popen, name: str, after: int) -> int:
    """Kills one of the processes of that name when so many answers are kept; its number."""
    end = time.monotonic() + 400
    while len(rows(folder, "samples.jsonl")) < after:
        assert run.poll() is None and time.monotonic() < end, (folder.parent / f"{folder.name}.log").read_text()
        time.sleep(0.2)
    pid = processes(run.pid, name)[0]
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_run_whose_workers_are_killed_trains_on_the_answers_of_one_process(tmp_path):
    here = start(tmp_path, "here")
    assert here.wait(600) == 0, (tmp_path / "here.log").read_text()
    more = [f"--config.rollout.workers.{role}={n}" for role, n in (("rollout", 2), ("reward", 1))]
    there = start(tmp_path, "there", *more)
    try:
        killed(tmp_path / "there", there, "Rollout", 24)
        killed(tmp_path / "there", there, "Reward", 48)
        assert there.wait(600) == 0, (tmp_path / "there.log").read_text()
    finally:
        there.kill()
    wanted, got = (rows(tmp_path / name, "samples.jsonl") for name in RUNS)
    asked = [row for row in got if row["kind"] == "sample"]
    assert [(row["step"], row["uid"], row["member"]) for row in asked] == [
        (step, 6 * step + n, i) for step in range(4) for n in range(6) for i in range(4)
    ]
    assert {row["kind"] for row in got} <= {"sample", "prompt"}
    facts = ("kind", "uid", "member", "tokens", "versions", "images", "reward", "prompt")
    assert [[row.get(fact) for fact in facts] for row in got] == [[row.get(fact) for fact in facts] for row in wanted]
    steps = [[row for row in rows(tmp_path / name, "metrics.jsonl") if row["kind"] == "train"] for name in RUNS]
    for one, other in zip(*steps, strict=True):
        assert one["grad_norm"] > 0 and math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=1e-3)
        assert other["mismatch_gap_max"] < 1e-4 and other["mismatch_kl"] < 1e-8
    last = steps[1][-1]
    assert last["step"] == 4 and last["workers/lost/rollout"] == 1 and last["workers/lost/reward"] <= 1
