"""Does stage 5 learn the same from a server of ours, by URL, as from the engine in its own process?

    python benchmarks/rl_url.py [--steps 12] [--out FILE]

A real stage 5 from a fresh nano policy (towers of one layer), 8 prompts x 4 answers a step; reward is the share of
vowels in an answer, told by a small judge over HTTP. Three runs with one seed: the engine in the process of the run,
and `glmv serve` in another, both without staleness, so that the weights of every step go there as a folder of
safetensors before anything is drawn for it; and the server with answers that may be one update old.

Prints one JSON line: by run the mean reward of each step, its mean over the last third, seconds of the steps (of the
first run also what compiles), the mean KL between who drew and the trainer, and the largest difference of their
log-probabilities where the weights were the same; the share of the first step's and of all answers that both engines
wrote alike, id by id; and the largest difference of their reward curves. Exits with 1 when log-probabilities differ by
1e-4, or answers of the first step.
Five minutes on two cores. This file is also the experiment that it trains.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
GROUPS, ANSWERS, KEY = 8, 4, "rl_url"


def get_config(arg=None):
    """url: of the server, "" for this process.   judge: its URL.   cache: the folder of compiled programs."""
    from glmv_jax import config

    arg = config.parse_arg(arg, url="", judge="", cache="", steps=12, staleness=0)
    cfg = config.load(f"{ROOT}/experiments/rl_grpo.py:size=nano")
    part = {"kind": "judge", "judge": "quick", "box": False, "images": False, "scale": 100}
    cfg.rewards = {
        "workers": 1, "judges": {"quick": {"url": arg.judge, "model": "vowels", "connections": 64}},
        "sources": {name: {"parts": {"judge": part}} for name in cfg.data.weights},
    }  # fmt: skip
    values = {
        "steps": arg.steps, "save_every": 10**6, "log_every": 1, "compilation_cache": arg.cache,
        "model.vision.depth": 1, "model.decoder.depth": 1, "data.ahead": 0,
        "rollout.prompts": GROUPS, "rollout.group": ANSWERS, "rollout.rows": (4,), "rollout.max_new_tokens": 8,
        "rollout.pipeline": "async", "rollout.staleness": arg.staleness, "rollout.slots": GROUPS * ANSWERS,
        "rollout.engine": arg.url, "rollout.proximal": True, "eval.kinds": ("count",), "eval.documents": 1,
        "eval.questions": 1, "eval.few": 1, "eval.batch": 1, "eval.shown": 1, "eval.max_new_tokens": 2,
    }  # fmt: skip
    return config.override(cfg, [f"{name}={value}" for name, value in values.items()])


@contextlib.contextmanager
def serving(checkpoint: pathlib.Path, weights: pathlib.Path) -> Iterator[str]:
    """The URL of a server that takes weights from that folder."""
    from glmv_jax.data.tokenizer import BOX

    words = ["serve", "--checkpoint", checkpoint, "--port", "0", "--slots", str(GROUPS * ANSWERS), "--length", "256",
             "--image-patches", "64", "--weights", weights, "--allow", *BOX]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "glmv_jax.cli", *map(str, words)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        if (found := re.search(r"http://\S+(?=/v1)", process.stdout.readline())) is None:
            raise SystemExit("rl_url: the server did not start")
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def trained(name: str, arguments: str, folder: pathlib.Path, nursery: Any) -> tuple[dict[str, Any], list[dict]]:
    """What is told of a run, and its answers."""
    import numpy as np
    from real_runs import Run

    from glmv_jax.rl.metrics import mismatch_kl

    run = Run(nursery, f"{pathlib.Path(__file__).resolve()}:{arguments}", folder / name)
    if code := run.finish():
        raise SystemExit(f"rl_url: {name} ended with {code}: {run.said[-2000:]}")
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = sorted((r for r in rows if r["kind"] == "sample"), key=lambda r: (r["step"], r["uid"], r["member"]))
    rewards = [row["reward/mean"] for row in run.rows if row["kind"] == "train"]
    said, own, versions = (
        np.concatenate([np.array(row[key]) for row in answers]) for key in ("logprobs", "trained_logprobs", "versions")
    )
    now = versions == np.concatenate([np.full(len(row["tokens"]), row["trained_at"]) for row in answers])
    seconds = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))["train_seconds"]
    return {
        "rewards": [round(x, 4) for x in rewards], "last_third": statistics.fmean(rewards[-len(rewards) // 3 :]),
        "seconds": round(seconds, 1), "mismatch_kl": float(mismatch_kl(said, own).mean()),
        "largest_gap": float(np.abs(said - own)[now].max()), "tokens_of_older_weights": float(1 - now.mean()),
    }, answers  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--work", help="folder for the runs, kept (default: a temporary one)")
    parser.add_argument("--out")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"GLMV_API_KEY": KEY, "no_proxy": "127.0.0.1"}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from contest import emit, environment, log
    from real_runs import Nursery
    from rl_async import reply

    from tests.rl.rewards.fake_judge import running

    nursery, found, drawn = Nursery({}), {}, {}
    with tempfile.TemporaryDirectory() as temporary, running(lambda body, n: (0.0, reply(body, n)[1])) as judge:
        folder = pathlib.Path(options.work or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        common = f"judge={judge.url},cache={folder / 'cache'},steps={options.steps}"
        found["here"], drawn["here"] = trained("here", common, folder, nursery)
        log(f"here: {found['here']}")
        with serving(folder / "here", folder) as url:
            for name, staleness in (("url", 0), ("url_one_behind", 1)):
                arguments = f"{common},url={url},staleness={staleness}"
                found[name], drawn[name] = trained(name, arguments, folder, nursery)
                log(f"{name}: {found[name]}")
    nursery.close()
    pairs = list(zip(drawn["here"], drawn["url"], strict=True))
    alike = lambda pairs: statistics.fmean(a["tokens"] == b["tokens"] for a, b in pairs)  # noqa: E731
    first = alike([pair for pair in pairs if pair[0]["step"] == 0])
    emit(
        {
            "benchmark": "rl_url", "steps": options.steps, "groups": GROUPS, "answers": ANSWERS, **found,
            "alike_first_step": first, "alike": alike(pairs),
            "curves_differ_by": max(abs(a - b) for a, b in zip(found["here"]["rewards"], found["url"]["rewards"])),
            "load": os.getloadavg()[0], "environment": environment(),
        },
        options.out,
    )  # fmt: skip
    return int(first < 1 or max(run["largest_gap"] for run in found.values()) > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
