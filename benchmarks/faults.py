"""Does a run survive what can happen to it?

    python benchmarks/faults.py rl --form sync|async [--kills 20] [--seed 0] [--out FILE]
    python benchmarks/faults.py train [--only NAME,...] [--seed 0] [--out FILE]

rl: a real stage 5 (nano towers of one layer; groups of 4 answers graded by a rule in a worker process; a checkpoint
every other step) is killed with SIGKILL at random moments, a fifth of them while it starts, the others in the middle of
steps and while a checkpoint is being written, and started again until it has done its 30 steps; and anew, until it has
been killed so often. In the synchronous form the end has to be that of a run that nothing disturbed: weights and state
of the optimiser bit by bit, every row of metrics but for times, the sampled answers. In the asynchronous form, with the
inference engine, every prompt that was drawn is trained on once or waits in the saved state. 20 minutes on two cores.

train: each of the five stages, small, with two worker processes for its data, is killed in the middle of a step and
while it saves, in the middle of an epoch; its losses and weights have to end as if nothing had happened, and no process
may be left behind. And, with the toy stage of the tests: SIGTERM, a checkpoint cut short, one with a flipped bit, a
disk that is full or becomes read-only (needs root), either of two processes killed (`faults_train.py`). 15 minutes on
two idle cores, four times that on one busy one; FILE is written after each stage and case, and keeps what an earlier
call with another --only found.

Prints a table of faults tried, survived and lost, and one JSON line. A fault is survived when the next start goes on
from the newest checkpoint that was complete, and the end is right. Exits with 1 when one was lost. This file is also
the experiment that it trains.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import sys
import tempfile
from typing import Any

STEPS, GROUPS, ANSWERS, STALENESS, SAVE_EVERY = 30, 4, 4, 2, 2
EXPERIMENTS = {"mim": "cogvit_mim", "siglip": "cogvit_siglip", "pretrain": "vlm_pretrain", "sft": "vlm_sft",
               "rl": "rl_grpo"}  # fmt: skip
_TOWERS = {"model.vision.depth": 1, "model.decoder.depth": 1, "eval.documents": 1}
_ASKED = {"eval.kinds": ("count",), "eval.questions": 1, "eval.few": 1, "eval.batch": 1, "eval.shown": 1,
          "eval.max_new_tokens": 2}  # fmt: skip
SMALL = {
    "mim": {"model.vision.depth": 1, "teachers.semantic.kind": "hog", "batch": 8, "eval.batches": 1},
    "siglip": {"model.vision.depth": 1, "model.text.depth": 1, "batch": 16, "eval.pairs": 8},
    "pretrain": {**_TOWERS, "batch": 4, "eval.kinds": ("caption",)},
    "sft": {**_TOWERS, **_ASKED, "batch": 4},
    "rl": {**_TOWERS, **_ASKED, "data.ahead": 0, "rollout.prompts": GROUPS, "rollout.group": ANSWERS,
           "rollout.rows": (2,), "rollout.max_new_tokens": 6},
}  # fmt: skip
POINTS = ("starting", "training", "saving", "training", "saving", "training", "saving", "ending")


def vowels(text: str, sample):
    """A reward that answers of a model that has learnt nothing differ in: the share of vowels."""
    from glmv_jax.rl.rewards import Grade

    letters = [c for c in text.lower() if c.isalpha()]
    value = sum(c in "aeiou" for c in letters) / max(1, len(letters))
    return Grade(value, value > 0.5, {"format": 1.0, "score": value})


def get_config(arg=None):
    """stage: one of the five.   form: of stage 5, sync or async.   cache: the folder of compiled programs."""
    from glmv_jax import config

    arg = config.parse_arg(arg, stage="rl", form="sync", cache="", steps=STEPS, workers=0)
    root = pathlib.Path(__file__).resolve().parent.parent
    cfg = config.load(f"{root}/experiments/{EXPERIMENTS[arg.stage]}.py:size=nano")
    values = {"steps": arg.steps, "save_every": SAVE_EVERY, "log_every": 1, "compilation_cache": arg.cache,
              "data.workers": arg.workers, **SMALL[arg.stage]}  # fmt: skip
    if arg.stage == "rl":
        # A verdict that comes too late is another reward, which on a busy machine no two runs would have in common.
        rule = {"kind": "rule", "rule": "faults:vowels", "limit": 300.0}
        cfg.rewards = {"workers": 1, "sources": {name: {"parts": {"rule": rule}} for name in cfg.data.weights}}
        values |= {"rollout.pipeline": arg.form, "rollout.staleness": STALENESS,
                   "rollout.slots": 8 * (arg.form == "async")}  # fmt: skip
    return config.override(cfg, [f"{name}={value}" for name, value in values.items()])


def reinforcement(form: str, kills: int, seed: int, folder: pathlib.Path, nursery: Any) -> list[dict]:
    """The faults of one form, each as {"at", "survived", ...}."""
    from contest import log
    from equal_runs import accounts, differences
    from real_runs import Run, began_again, killed

    rng, faults = random.Random(f"{form}/{seed}"), []
    spec = f"{pathlib.Path(__file__).resolve()}:form={form},cache={folder / 'cache'}"
    whole, start = Run(nursery, spec, folder / "whole"), 30.0
    if form == "sync" and not whole.finished and whole.finish():
        raise SystemExit(f"faults: the run that nothing disturbs failed: {whole.said[-2000:]}")
    while len(faults) < kills:
        run, here = Run(nursery, spec, folder / f"killed-{len(faults)}"), []
        while not run.finished or here and here[-1].again is None:  # killed when all was written: started again too
            before, fault = len(run.said), None
            if len(faults) + len(here) < kills:
                fault, start = killed(run, POINTS[rng.randrange(len(POINTS))], rng, start)
            elif code := run.finish():
                raise SystemExit(f"faults: {run.folder.name} ended with {code}: {run.said[-2000:]}")
            if here:
                began_again(run, here[-1], before)
            if fault:
                here.append(fault)
                log(f"{len(faults) + len(here)}. killed while {fault.at} at step {fault.step}, saved {fault.saved}")
        wrong = differences(whole, run) if form == "sync" else accounts(run, GROUPS, ANSWERS, STALENESS)
        log(f"{len(here)} kills, then the end: {'; '.join(wrong) or 'as it should be'}")
        faults += [{"run": form, "at": f.at, "step": f.step, "saved": f.saved, "again": f.again, "wrong": wrong,
                    "survived": f.survived and not wrong} for f in here]  # fmt: skip
    return faults


def table(faults: list[dict]) -> str:
    """Faults tried, survived and lost, by what the run was doing."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for fault in faults:
        counts[fault["run"], fault["at"]].update(tried=1, survived=fault["survived"], lost=not fault["survived"])
    lines = [f"{'run':<9} {'fault':<22} {'tried':>6} {'survived':>9} {'lost':>5}"]
    for (form, at), c in sorted(counts.items()):
        lines.append(f"{form:<9} {at:<22} {c['tried']:>6} {c['survived']:>9} {c['lost']:>5}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rl", "train"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--form", choices=("sync", "async"), default="sync", help="of stage 5, for rl")
    parser.add_argument("--only", default="", help="of train: mim, siglip, pretrain, sft, rl, or cases of faults_train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help="folder for the runs, kept (default: a temporary one)")
    parser.add_argument("--out")
    options = parser.parse_args()
    import faults_train
    from contest import emit, save
    from real_runs import Nursery

    root = str(pathlib.Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    nursery = Nursery({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"})
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.work or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if options.what == "rl":
            faults = reinforcement(options.form, options.kills, options.seed, folder, nursery)
        else:
            faults = kept(options.out, options.only)
            for found in faults_train.each_of(options.only, options.seed, folder, nursery):
                faults += found
                save(record(options, faults), options.out)
    nursery.close()
    print(table(faults), file=sys.stderr)
    emit(found := record(options, faults), options.out)
    return 1 if found["lost"] else 0


def kept(out: str | None, only: str) -> list[dict]:
    """The faults in the file that are not tried again; none when all are."""
    path = pathlib.Path(out or "")
    if not only or not path.is_file():
        return []
    tried = {name.replace("_", " ") for name in only.split(",")}
    before = json.loads(path.read_text(encoding="utf-8"))["faults"]
    return [fault for fault in before if not tried & {fault["run"], fault["at"]}]


def record(options: argparse.Namespace, faults: list[dict]) -> dict:
    from contest import environment

    lost = sum(not fault["survived"] for fault in faults)
    counts = {"tried": len(faults), "survived": len(faults) - lost, "lost": lost}
    about = {"benchmark": f"faults_{options.what}", "seed": options.seed}
    return {**about, **counts, "faults": faults, "environment": environment()}


if __name__ == "__main__":
    sys.exit(main())
