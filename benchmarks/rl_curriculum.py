"""How many groups of a real run have a gradient, with the curriculum and without?

    python benchmarks/rl_curriculum.py --start runs/quickstart/rl [--steps 40] [--workdir DIR] [--out FILE]

Stage 5 at nano size goes on from a finished run, once with prompts drawn as they come and once with
cfg.rollout.curriculum; the same seed, 32 prompts of 8 answers a step. --tasks: more than the start was trained on, so
that some are too hard and some too easy, as the mixtures of long runs are.

Prints one JSON line. "useful": the share of groups whose rewards differ, over the steps from --known on (until then
pass rates are being learnt), by arm, and by source. "gain": curriculum over alike. "reward": mean over the same steps.
In a simulation with half of the prompts too easy, a third too hard (tests/rl/test_curriculum.py) the gain is at least
1.5; here it is what the levels of the tasks allow.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
from contest import emit, environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TASKS = ("read", "count", "name", "attribute", "spatial", "point", "chart", "arithmetic", "geometry", "puzzle")
SETTINGS = ["rollout.prompts=32", "rollout.rows=(8,)", "log_every=1", "data.prompt_tokens=96", "data.targets=208",
            "eval.questions=8", "eval.documents=8"]  # fmt: skip


def run(folder: pathlib.Path, start: pathlib.Path, tasks: tuple[str, ...], steps: int, on: bool) -> list[dict]:
    """What the steps of a run said, one by one."""
    from glmv_jax import config
    from glmv_jax.train import main

    cfg = config.load(str(ROOT / "experiments/rl_grpo.py:size=nano"))
    cfg.data.weights, cfg.eval.kinds = {task: 1.0 for task in tasks}, tasks
    cfg = config.override(cfg, [*SETTINGS, f"init_from={start}", f"steps={steps}", f"rollout.curriculum.on={on}"])
    main.run(cfg, folder)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["kind"] == "train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--known", type=int, default=15)
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--out")
    options = parser.parse_args()
    folder, tasks = options.workdir or pathlib.Path(tempfile.mkdtemp()), tuple(options.tasks.split(","))
    mean = lambda rows, key: round(float(np.mean([row[key] for row in rows if key in row])), 3)  # noqa: E731
    useful, reward, by_source = {}, {}, {}
    for name, on in (("alike", False), ("curriculum", True)):
        made = run(folder.absolute() / name, options.start.absolute(), tasks, options.steps, on)
        known = [row for row in made if row["step"] > options.known]
        useful[name], reward[name] = round(1 - mean(known, "same/mean"), 3), mean(known, "reward/mean")
        by_source[name] = {task: round(1 - mean(known, f"same/{task}"), 3) for task in tasks}
    emit(
        {
            "benchmark": "rl_curriculum", "steps": options.steps, "known": options.known, "useful": useful,
            "gain": round(useful["curriculum"] / useful["alike"], 2), "by_source": by_source, "reward": reward,
            **environment(),
        },
        options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
