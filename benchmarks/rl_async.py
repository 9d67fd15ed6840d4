"""Asynchronous against synchronous in real time, where some verdicts take long: wall time and reward.

    python benchmarks/rl_async.py [--seeds 3] [--steps 60] [--out FILE]

A real stage 5 from a fresh nano policy (towers of one layer), 8 questions x 4 answers a step, graded by a model judge
via HTTP whose latency has a heavy tail: exponential around 0.15 s, and one verdict in 25 takes 3 s. It costs the
machine nothing, as a judge elsewhere does; the reward is the share of vowels, which a policy learns from nothing, from
.2 to where all its answers are as one. They are 8 tokens long or nearly so: decoding has no tail here, and lockstep,
which the synchronous form draws by, is the fastest way. So what can be gained is the waiting for verdicts, and that
alone: the synchronous form waits for the slowest of 32 in every step, most often 3 s, and the asynchronous one trains
on what is there meanwhile, at most 2 updates behind (late="wait": no answer is thrown away). What the engine gains by
itself where lengths have a tail, `engine.py` measures.

Both learn by CISPO, which is that of "clip" where answers are of today's policy, as in the synchronous form. Where they
are of two updates ago "clip" leaves out the tokens that have become likelier by more than its 28 %, here a tenth of all
and the very ones that are right: of one seed 60 updates then learnt what 37 do in the synchronous form.

Both forms have the same weights at first, the same mixture of questions in the same order, as many updates and answers
a batch; the n-th verdict about a question takes equally long in both. They run in turns, one after the other, on the
same cores. Programs are compiled beforehand (--steps of them 1) and read from files. The first 5 steps count in
neither form: in them programs are read, connections opened and the pipeline filled, which has as much under way behind
the last step as behind these.

Prints one JSON line; by form and seed:
    seconds    from the end of step 5 to the end of the last: what is compared
    whole      the same with the first 5 and what comes before the first request, the engine's set-up
    waiting    of the whole, the seconds in which the trainer waited for a batch
    reward     mean over the last quarter of the steps, of the answers trained on, which in the asynchronous form are of
               up to 2 updates before
    questions  that were trained on; "in common" says how many of them in both forms
and ratios and differences of the two forms. Targets: ratio of seconds at most 0.6 for every seed; the mean difference
of rewards no less than twice its standard error below 0. Needs a quiet machine: what answers and updates cost is the
same for both, and hides what waiting costs. 17 minutes on two cores. This file is also the experiment that it trains.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import pathlib
import random
import statistics
import sys
import tempfile
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
GROUPS, ANSWERS, STALENESS, TYPICAL, SLOW, SHARE = 8, 4, 2, 0.15, 3.0, 1 / 25
RATE = 1e-2
FIRST = 5  # steps that do not count


def get_config(arg=None):
    """form: sync or async.   judge: its URL.   cache: the folder of compiled programs."""
    from glmv_jax import config

    arg = config.parse_arg(arg, form="sync", judge="", cache="", seed=0, steps=60)
    cfg = config.load(f"{ROOT}/experiments/rl_grpo.py:size=nano")
    part = {"kind": "judge", "judge": "slow", "box": False, "images": False, "scale": 100}
    cfg.rewards = {
        "workers": 1, "judges": {"slow": {"url": arg.judge, "model": "vowels", "connections": 256}},
        "sources": {name: {"parts": {"judge": part}} for name in cfg.data.weights},
    }  # fmt: skip
    values = {
        "seed": arg.seed, "steps": arg.steps, "save_every": 10**6, "log_every": 1, "compilation_cache": arg.cache,
        "optim.lr": RATE, "loss.surrogate": "cispo", "model.vision.depth": 1, "model.decoder.depth": 1, "data.ahead": 0,
        "rollout.prompts": GROUPS, "rollout.group": ANSWERS, "rollout.rows": (4,), "rollout.max_new_tokens": 8,
        "rollout.pipeline": arg.form, "rollout.staleness": STALENESS * (arg.form == "async"),
        "rollout.slots": GROUPS * ANSWERS * (arg.form == "async"), "eval.kinds": ("count",), "eval.documents": 1,
        "eval.questions": 1, "eval.few": 1, "eval.batch": 1, "eval.shown": 1, "eval.max_new_tokens": 2,
    }  # fmt: skip
    return config.override(cfg, [f"{name}={value}" for name, value in values.items()])


def judging(seed: int) -> Callable[[dict, int], tuple[float, str]]:
    """A judge's reply to (the body of a request, its number): (seconds until it comes, the verdict)."""
    from tests.rl.rewards.fake_judge import between, word

    asked: collections.Counter[str] = collections.Counter()

    def reply(body: dict, number: int) -> tuple[float, str]:
        del number  # requests come in another order in another form
        if "VERDICT" not in body["messages"][0]["content"]:
            return 0.0, "yes"  # it is asked whether it is there
        question = between(body, "QUESTION")
        asked[question] += 1
        rng = random.Random(f"{seed}/{question}/{asked[question]}")
        seconds = SLOW if rng.random() < SHARE else rng.expovariate(1 / TYPICAL)
        letters = [c for c in between(body, "ANSWER").lower() if c.isalpha()]
        share = sum(c in "aeiou" for c in letters) / max(1, len(letters))
        return seconds, f"VERDICT {word(body)} {round(100 * share)}"

    return reply


def trained(form: str, seed: int, steps: int, folder: pathlib.Path, nursery) -> tuple[dict[str, float], set[str]]:
    """What is told of one run, and the questions that it was trained on."""
    from real_runs import Run

    from tests.rl.rewards.fake_judge import running

    with running(judging(seed)) as judge:
        spec = f"{pathlib.Path(__file__).resolve()}:form={form},judge={judge.url},cache={folder / 'cache'}"
        run = Run(nursery, f"{spec},seed={seed},steps={steps}", folder / f"{form}-{seed}-{steps}")
        if code := run.finish():
            raise SystemExit(f"rl_async: {run.folder.name} ended with {code}: {run.said[-2000:]}")
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    rows = [row for row in run.rows if row["kind"] == "train"]
    lines = (run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [row for row in map(json.loads, lines) if row["kind"] == "sample"]
    rewards = [row["reward/mean"] for row in rows]
    told = {"whole": round(results["train_seconds"], 2),
            "waiting": round(results["goodput"]["seconds"]["rollouts"], 2), "first": rewards[0],
            "reward": statistics.fmean(rewards[-max(1, len(rewards) // 4) :]), "updates": len(rows),
            "answers": len(answers), "verdicts": len(judge.bodies) - 1}  # fmt: skip
    if len(rows) > FIRST:
        told["seconds"] = round(rows[-1]["wall"] - rows[FIRST - 1]["wall"], 2)
    questions = {row["id"] for row in answers}
    return told | {"questions": len(questions)}, questions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--work", help="folder for the runs, kept (default: a temporary one)")
    parser.add_argument("--out")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from contest import emit, environment, log, spread
    from real_runs import Nursery

    if options.steps <= FIRST:
        parser.error(f"--steps {options.steps}: the first {FIRST} do not count; ask for more")
    nursery, found, asked = Nursery({"no_proxy": "127.0.0.1"}), {"sync": [], "async": []}, {"sync": [], "async": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.work or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for form in found:
            trained(form, 0, 1, folder, nursery)  # compiles
        for seed in range(options.seeds):
            for form in list(found)[:: 1 if seed % 2 == 0 else -1]:
                told, questions = trained(form, seed, options.steps, folder, nursery)
                found[form].append(told)
                asked[form].append(questions)
                log(f"seed {seed}, {form}: {told}")
    nursery.close()
    pairs = list(zip(found["sync"], found["async"]))
    ratios, wholes = ([b[name] / a[name] for a, b in pairs] for name in ("seconds", "whole"))
    gains = [b["reward"] - a["reward"] for a, b in pairs]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    worse = statistics.fmean(gains) < -2 * error
    emit(
        {
            "benchmark": "rl_async", "steps": options.steps, "groups": GROUPS, "answers": ANSWERS,
            "staleness": STALENESS, "latency": {"typical": TYPICAL, "slow": SLOW, "share": SHARE}, **found,
            "in common": [len(a & b) for a, b in zip(*asked.values())],
            "async_over_sync": spread(ratios, 3), "async_over_sync_whole": spread(wholes, 3),
            "reward_gained": spread(gains, 3), "standard_error": error,
            "load": os.getloadavg()[0], "environment": environment(),
        },
        options.out,
    )  # fmt: skip
    return int(max(ratios) > 0.6 or worse)


if __name__ == "__main__":
    sys.exit(main())
