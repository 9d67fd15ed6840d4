"""Does GRPO lift the reward of a tiny model on three mixed tasks, and is it the pictures that it learns to read?

    python benchmarks/rl_lift.py --start runs/quickstart/sft [--steps 200] [--workdir DIR] [--out FILE]

Three tasks in one run of stage 5: `name` and `attribute` have a picture, `riddle` is text alone. --start: a finished
run of nano size (launch/quickstart.sh makes one), which a short SFT shows the form of the three tasks first: the start
that is compared with. Rewards are of 96 held-out questions a task, answers drawn at temperature 1 as in training. A
workdir that holds finished stages is used as it is; one that was stopped goes on.

Prints one JSON line. "reward" and "accuracy": [start, after SFT + RL] by task, with their mean; "shuffled": the same
where every question has the picture of another one; "kept": the share of the gain in reward that is left then.
"minutes": of the steps of RL alone, of all, and of the processor. Targets: the mean of the rewards rises by at least .3
in under 20 minutes, and of the gain of every task with pictures less than a third is left when they are shuffled.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import tempfile
import time

import jax
from contest import emit, environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TASKS = ("name", "attribute", "riddle")
PICTURED = TASKS[:2]
ROLLOUT = ["rollout.prompts=32", "rollout.rows=(8,)"]
ROWS = ["data.prompt_tokens=96", "data.tokens=256", "data.targets=208"]


def trained(name: str, folder: pathlib.Path, start: pathlib.Path, *changes: str) -> dict:
    """Runs an experiment on the three tasks; its results."""
    from glmv_jax import config
    from glmv_jax.train import main

    cfg = config.load(str(ROOT / f"experiments/{name}.py") + ":size=nano")
    cfg.data.weights = {task: 1.0 for task in TASKS}
    cfg.eval.kinds = TASKS
    cfg = config.override(cfg, [f"init_from={start}", "eval.questions=8", "eval.documents=8", *ROWS, *changes])
    return main.run(cfg, folder)


def measured(folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Of the run in `folder`: mean reward and accuracy by task, with the pictures and with those of other questions."""
    from glmv_jax import rl
    from glmv_jax.eval import vlm as vlm_eval
    from glmv_jax.rl import tasks
    from glmv_jax.train import checkpoint, main, weights
    from glmv_jax.train.stages.vlm_measures import held_out

    stage = main.stage_class("rl" if folder.name == "rl" else "sft")(checkpoint.load_config(folder))
    params = weights.load(folder, like=jax.eval_shape(stage.init_params, jax.random.key(0)))
    score = functools.partial(rl.score, verifiers=tasks.verifiers(TASKS))
    asked = {task: samples for task, samples in held_out(TASKS, 96).items()}
    found: dict[str, dict[str, float]] = {"reward": {}, "accuracy": {}, "shuffled": {}}
    for task, samples in asked.items():
        for shuffled in (False, True)[: 1 + (task in PICTURED)]:
            chosen = vlm_eval.with_shuffled_images(samples) if shuffled else samples
            drawn = {"temperature": 1.0, "max_new_tokens": stage.cfg.eval.max_new_tokens}
            grades = score(chosen, vlm_eval.answers(stage.answering(params), params, chosen, stage.asker, **drawn))
            mean = lambda of: round(sum(map(of, grades)) / len(grades), 3)  # noqa: B023, E731
            found["shuffled" if shuffled else "reward"][task] = mean(lambda grade: grade.reward)
            if not shuffled:
                found["accuracy"][task] = mean(lambda grade: grade.correct)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=pathlib.Path, required=True)
    parser.add_argument("--sft-steps", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--out")
    options = parser.parse_args()
    folder, begin = options.workdir or pathlib.Path(tempfile.mkdtemp()), time.time()
    folder = folder.absolute()
    trained("vlm_sft", folder / "sft", options.start.absolute(), f"steps={options.sft_steps}")
    before = measured(folder / "sft")
    result = trained("rl_grpo", folder / "rl", folder / "sft", f"steps={options.steps}", *ROLLOUT)
    after = measured(folder / "rl")
    pairs = {what: {task: [before[what][task], after[what][task]] for task in before[what]} for what in before}
    for what in ("reward", "accuracy"):
        pairs[what]["mean"] = [round(sum(x[what].values()) / len(TASKS), 3) for x in (before, after)]
    gain = lambda what, task: pairs[what][task][1] - pairs[what][task][0]  # noqa: E731
    emit(
        {
            "benchmark": "rl_lift", "steps": options.steps, "sft_steps": options.sft_steps, **pairs,
            "kept": {task: round(gain("shuffled", task) / max(gain("reward", task), 1e-9), 3) for task in PICTURED},
            "lift": round(gain("reward", "mean"), 3),
            "minutes": {"steps": round(result["train_seconds"] / 60, 1), "all": round((time.time() - begin) / 60, 1),
                        "processor": round(time.process_time() / 60, 1)},
            **environment(),
        },
        options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
