"""Asynchronous against synchronous in real time, where some verdicts take long: wall time and reward.

    python benchmarks/rl_async.py [--seeds 3] [--steps 40] [--out FILE]

A real stage 5 from a fresh nano policy (towers of one layer), 8 prompts x 4 answers a step, graded by a model judge via
HTTP whose latency has a heavy tail: exponential around 0.2 s, and one verdict in 25 takes 5 s. It costs the machine
nothing, as a judge elsewhere does; the reward is the share of vowels, which a policy can learn from nothing. Both forms
train on as many prompts and answers; the asynchronous one has the inference engine write answers one by one and may be
4 updates behind (late="wait": no answer is thrown away). Forms run in turns, one after the other, on the same cores.

Prints one JSON line: by seed "seconds" that the steps took, with everything that happened between the first request for
a batch and the end of the last step, and "reward", the mean over the last quarter of the steps; their ratio and
difference. Targets: ratio at most 0.6; the mean difference no less than twice its standard error below 0. Needs a quiet
machine: what answers and updates cost is the same for both, and hides what waiting costs. 20 minutes on two cores.
This file is also the experiment that it trains.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import random
import statistics
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
GROUPS, ANSWERS, STALENESS, TYPICAL, SLOW, SHARE = 8, 4, 4, 0.2, 5.0, 1 / 25


def get_config(arg=None):
    """form: sync or async.   judge: its URL.   cache: the folder of compiled programs."""
    from glmv_jax import config

    arg = config.parse_arg(arg, form="sync", judge="", cache="", seed=0, steps=40)
    cfg = config.load(f"{ROOT}/experiments/rl_grpo.py:size=nano")
    part = {"kind": "judge", "judge": "slow", "box": False, "images": False, "scale": 100}
    cfg.rewards = {
        "workers": 1, "judges": {"slow": {"url": arg.judge, "model": "vowels", "connections": 256}},
        "sources": {name: {"parts": {"judge": part}} for name in cfg.data.weights},
    }  # fmt: skip
    values = {
        "seed": arg.seed, "steps": arg.steps, "save_every": 10**6, "log_every": 1, "compilation_cache": arg.cache,
        "model.vision.depth": 1, "model.decoder.depth": 1, "data.ahead": 0,
        "rollout.prompts": GROUPS, "rollout.group": ANSWERS, "rollout.rows": (4,), "rollout.max_new_tokens": 8,
        "rollout.pipeline": arg.form, "rollout.staleness": STALENESS * (arg.form == "async"),
        "rollout.slots": GROUPS * ANSWERS * (arg.form == "async"), "eval.kinds": ("count",), "eval.documents": 1,
        "eval.questions": 1, "eval.few": 1, "eval.batch": 1, "eval.shown": 1, "eval.max_new_tokens": 2,
    }  # fmt: skip
    return config.override(cfg, [f"{name}={value}" for name, value in values.items()])


def reply(body: dict, number: int) -> tuple[float, str]:
    """(seconds until it comes, the verdict).   number: of the request, which all chance here depends on."""
    from tests.rl.rewards.fake_judge import between, word

    if "VERDICT" not in body["messages"][0]["content"]:
        return 0.0, "yes"  # it is asked whether it is there
    rng = random.Random(number)
    seconds = SLOW if rng.random() < SHARE else rng.expovariate(1 / TYPICAL)
    letters = [c for c in between(body, "ANSWER").lower() if c.isalpha()]
    share = sum(c in "aeiou" for c in letters) / max(1, len(letters))
    return seconds, f"VERDICT {word(body)} {round(100 * share)}"


def trained(form: str, seed: int, steps: int, folder: pathlib.Path, nursery) -> dict[str, float]:
    """Seconds, reward and answers of one run."""
    import json

    from real_runs import Run

    from tests.rl.rewards.fake_judge import running

    with running(reply) as judge:
        spec = f"{pathlib.Path(__file__).resolve()}:form={form},judge={judge.url},cache={folder / 'cache'}"
        run = Run(nursery, f"{spec},seed={seed},steps={steps}", folder / f"{form}-{seed}-{steps}")
        if code := run.finish():
            raise SystemExit(f"rl_async: {run.folder.name} ended with {code}: {run.said[-2000:]}")
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    rewards = [row["reward/mean"] for row in run.rows if row["kind"] == "train"]
    last = rewards[-max(1, len(rewards) // 4) :]
    return {"seconds": round(results["train_seconds"], 2), "first": rewards[0], "reward": statistics.fmean(last),
            "updates": len(rewards), "asked": len(judge.bodies)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", help="folder for the runs, kept (default: a temporary one)")
    parser.add_argument("--out")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from contest import emit, environment, log, spread
    from real_runs import Nursery

    nursery, found = Nursery({"no_proxy": "127.0.0.1"}), {"sync": [], "async": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.work or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for form in found:
            trained(form, 0, 1, folder, nursery)  # compiles
        for seed in range(options.seeds):
            for form in list(found)[:: 1 if seed % 2 == 0 else -1]:
                found[form].append(trained(form, seed, options.steps, folder, nursery))
                log(f"seed {seed}, {form}: {found[form][-1]}")
    nursery.close()
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(found["sync"], found["async"])]
    gains = [b["reward"] - a["reward"] for a, b in zip(found["sync"], found["async"])]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    worse = statistics.fmean(gains) < -2 * error
    emit(
        {
            "benchmark": "rl_async", "steps": options.steps, "groups": GROUPS, "answers": ANSWERS,
            "staleness": STALENESS, "latency": {"typical": TYPICAL, "slow": SLOW, "share": SHARE}, **found,
            "async_over_sync": spread(ratios, 3), "reward_gained": spread(gains, 3), "standard_error": error,
            "load": os.getloadavg()[0], "environment": environment(),
        },
        options.out,
    )  # fmt: skip
    return int(max(ratios) > 0.6 or worse)


if __name__ == "__main__":
    sys.exit(main())
