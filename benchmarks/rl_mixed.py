"""Do tasks train better together? One start, RL on 31 kinds at once, RL on some of them alone, held-out rewards of all.

    python benchmarks/rl_mixed.py --init RUN/pretrain [--runs runs/mixed] [--steps 300] [--out FILE.json]

RUN: of launch/quickstart.sh. In order: the start (SFT), `joint`, a run a kind of --alone with as many questions of it
as `joint` had, and the rewards on held-out questions: answers drawn at temperature 1, and greedy ones, each with the
question's own images and with another question's. Kinds that lost reward are asked other questions, seven times as
many, which tell a loss from chance. Prints a table; --out keeps every number and draws them, as .svg.
--steps is of `joint`. Stop it whenever you like: the same command goes on, a larger --steps goes on from what there is.
`glmv report --run runs/mixed` shows the curves of every source.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from glmv_jax.config import load
from glmv_jax.data.heldout import prompt_chunks
from glmv_jax.eval.vlm import with_shuffled_images
from glmv_jax.inference.sampler import Prompts, Sampler, Sampling
from glmv_jax.inference.text import answer_text
from glmv_jax.train import weights
from glmv_jax.train.checkpoint import load_config, newest
from glmv_jax.train.main import stage_class
from glmv_jax.train.stages.vlm_measures import held_out
from glmv_jax.train.sweep.child import Child, Stopper, progress_of, train_command

EXPERIMENT = "experiments/rl_mixed.py"
ALONE = ("attribute", "gui_step", "formula", "count", "point", "arithmetic")
CONDITIONS = ("drawn", "drawn shuffled", "greedy", "greedy shuffled")
ROWS = 64  # answers at a time
BINS = 10  # parts of a run whose mean rewards are compared
FORGOTTEN = -0.05
MORE = 8


# --- the runs ---------------------------------------------------------------------------------------------------------


def train(folder: pathlib.Path, config: str, *overrides: str) -> None:
    """One `glmv train`, the last override its steps. Says every half minute how far it is; notes its processor time."""
    steps, first, said, began = int(overrides[-1].removeprefix("steps=")), None, time.monotonic(), _spent()
    say, before = functools.partial(print, file=sys.stderr, flush=True), progress_of(folder)[0]
    if before >= steps and (folder / "results.json").exists():
        return say(f"{folder.name}: done before")
    with Stopper(say) as stopper:
        child = stopper.children[folder.name] = Child(
            folder.with_suffix(".log"), train_command(config, folder, overrides)
        )
        while not child.poll():
            time.sleep(1)
            step = progress_of(folder)[0]
            if step and first is None:
                first = (step, time.monotonic())
            if first and step > first[0] and time.monotonic() - said > 30:
                said = time.monotonic()
                left = (said - first[1]) / (step - first[0]) * (steps - step) / 60
                say(f"{folder.name}: step {step} of {steps}, {left:.0f} min left")
    if (step := progress_of(folder)[0]) > before:
        with open(folder / "processor.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"to": step, "of": steps, "seconds": round(_spent() - began, 1)}) + "\n")
    if stopper.number:
        raise SystemExit("rl_mixed.py: stopped; the same command goes on from here")
    if child.exit_code:
        raise SystemExit(f"rl_mixed.py: {folder} ended with {child.exit_code}; its last words:\n{child.last_words(5)}")
    say(f"{folder.name}: done")


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def attempts(folder: pathlib.Path) -> list[dict[str, float]]:
    """What a run took: of each attempt the step it came to, of how many, and its processor seconds, all included."""
    return [json.loads(line) for line in (folder / "processor.jsonl").read_text().splitlines()]


# --- held-out rewards -------------------------------------------------------------------------------------------------


def rewards(run: pathlib.Path, kinds: Sequence[str], questions: int, draws: int) -> dict[str, dict[str, dict]]:
    """kind -> condition -> {question: mean reward}, kept in the run's folder under its step."""
    path, step = run / "heldout.json", newest(run).name
    about = {"step": step, "questions": questions, "draws": draws}
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = kept["rewards"] if kept.get("about") == about else {}
    missing = [kind for kind in kinds if kind not in found]
    if missing:
        ask = _asker(run, missing, draws)
        for n, kind in enumerate(missing):
            found[kind] = ask(kind, held_out([kind], questions)[kind])
            path.write_text(json.dumps({"about": about, "rewards": found}))
            print(f"{run.name}: held-out {kind}, {n + 1} of {len(missing)}", file=sys.stderr, flush=True)
    return {kind: found[kind] for kind in kinds}


def asked_again(start: pathlib.Path, joint: pathlib.Path, kinds: Sequence[str], asked: int, draws: int) -> dict:
    """kind -> way of answering -> `paired` over the (MORE - 1) `asked` held-out questions behind those asked before."""
    found: dict[str, dict[str, dict]] = {}
    ask = {run: _asker(run, kinds, draws) for run in (start, joint)} if kinds else {}
    for kind in kinds:
        questions = held_out([kind], MORE * asked)[kind][asked:]
        before, after = (of_run(kind, questions) for of_run in ask.values())
        found[kind] = {way: paired(before[way], after[way]) for way in ("drawn", "greedy")}
        print(f"asked again: {kind}", file=sys.stderr, flush=True)
    return found


def _asker(run: pathlib.Path, kinds: Sequence[str], draws: int):
    from glmv_jax.rl import score, tasks

    cfg = load_config(run)
    r = load(EXPERIMENT).rollout
    stage = stage_class(cfg.stage)(cfg)
    params = jax.device_put(weights.load(run))
    graded = functools.partial(score, verifiers=tasks.verifiers(kinds))

    @functools.cache
    def sampler(tokens: int, temperature: float) -> Sampler:
        sampling = Sampling.chat(stage.tokenizer, tokens, temperature=temperature)
        return Sampler(stage.model, sampling, draws if temperature else 1)

    def ask(kind, samples):
        tokens = dict(r.limits).get(kind, r.max_new_tokens)
        found = {}
        for condition in CONDITIONS:
            using = sampler(tokens, 1.0 if condition.startswith("drawn") else 0.0)
            asked = with_shuffled_images(samples) if condition.endswith("shuffled") else samples
            values: dict[str, list[float]] = {}
            for n, (rows, chunk) in enumerate(prompt_chunks(asked, stage.asker, ROWS // using.group, [kind])):
                out = jax.device_get(using(params, Prompts.of(rows), jax.random.fold_in(jax.random.key(1), n)))
                each = [sample for sample in chunk for _ in range(using.group)]
                answers = [ids[:length] for ids, length in zip(out.tokens[: len(each)], out.lengths)]
                texts = [answer_text(stage.tokenizer, ids, using.sampling.stop) for ids in answers]
                for sample, grade in zip(each, graded(each, texts)):
                    values.setdefault(sample.id, []).append(grade.reward)
            found[condition] = {name: float(np.mean(x)) for name, x in values.items()}
        return found

    return ask


def paired(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The mean difference over the questions that both have, and its standard error; nan without two of them."""
    gaps = [after[name] - before[name] for name in before if name in after]
    if len(gaps) < 2:
        return {"mean": float("nan"), "error": float("nan")}
    return {"mean": float(np.mean(gaps)), "error": float(np.std(gaps, ddof=1) / len(gaps) ** 0.5)}


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95% of the means of sources drawn with replacement."""
    picked = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(np.asarray(values)[picked].mean(1), [0.025, 0.975])
    return float(low), float(high)


def verdict(gains: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Of {source: paired}: how many rose, by how much, and which were forgotten."""
    means = {kind: gain["mean"] for kind, gain in gains.items()}
    sure = lambda sign: [k for k, g in gains.items() if sign * g["mean"] > 1.96 * g["error"]]  # noqa: E731
    return {
        "sources": len(gains), "mean": float(np.mean(list(means.values()))), "interval": interval(list(means.values())),
        "better": sum(x > 0 for x in means.values()), "surely better": sure(1), "surely worse": sure(-1),
        "least": min(means.items(), key=lambda item: item[1]),
        "forgotten": [kind for kind, x in means.items() if x < FORGOTTEN],
    }  # fmt: skip


# --- curves -----------------------------------------------------------------------------------------------------------


def curve(run: pathlib.Path, kind: str) -> list[float]:
    """Mean training reward of a kind in each of BINS equal parts of the run's steps; its questions are always new."""
    steps = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "train" and f"reward/{kind}" in row:
            steps[row["step"]] = row[f"reward/{kind}"]
    values = [value for _, value in sorted(steps.items())]
    return [float(np.mean(part)) for part in np.array_split(values, min(BINS, len(values)))]


def oscillation(values: Sequence[float]) -> dict[str, float]:
    """falls: the mean fall from one part to the next, 0 where it rises. rough: root mean square of second differences
    over sqrt(6), which is the deviation of noise around a straight line."""
    steps, bends = np.diff(values), np.diff(values, 2)
    return {"falls": float(np.maximum(0, -steps).mean()), "rough": float(np.sqrt((bends**2).mean() / 6))}


# --- what is shown ----------------------------------------------------------------------------------------------------


def plot(sources: dict[str, dict[str, float]], curves: dict[str, dict[str, list[float]]]) -> str:
    """Left a line a source: from the start to joint, a ring with another question's images. Right the curves."""
    line, left, wide = 14, 100, 300
    height = 40 + line * len(sources)
    parts = [
        "<style>text{font:10px sans-serif;fill:#444}.title{font-weight:bold}.a{stroke:#999}.joint{fill:#3b6fb6}"
        ".start{fill:#999}.ring{fill:none;stroke:#c0504d}.c0{fill:none;stroke:#3b6fb6}.c1{fill:none;stroke:#d08020}"
        ".box{fill:none;stroke:#ccc}@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>",
        f'<text class="title" x="{left}" y="14">held-out reward, drawn: start (grey), joint (blue), joint with '
        "another image (ring)</text>",
    ]
    x_of = lambda v: left + wide * v  # noqa: E731
    for n, (kind, values) in enumerate(sorted(sources.items(), key=lambda item: -item[1]["joint"])):
        y = 32 + line * n
        parts.append(f'<text x="{left - 6}" y="{y + 3}" text-anchor="end">{kind}</text>')
        parts.append(f'<path class="a" d="M{x_of(values["start"]):.1f} {y}H{x_of(values["joint"]):.1f}"/>')
        for name, of in (("start", "start"), ("joint", "joint"), ("ring", "shuffled")):
            if values.get(of) is not None:
                parts.append(f'<circle class="{name}" cx="{x_of(values[of]):.1f}" cy="{y}" r="3"/>')
    for n, (kind, pair) in enumerate(curves.items()):
        x0, y0, w, h = left + wide + 40 + 150 * (n % 2), 30 + 110 * (n // 2), 120, 80
        top = max(0.05, *pair["joint"], *pair["alone"])
        parts.append(f'<text class="title" x="{x0}" y="{y0 - 4}">{kind} (0 to {top:.2f})</text>')
        parts.append(f'<rect class="box" x="{x0}" y="{y0}" width="{w}" height="{h}"/>')
        for c, name in enumerate(("joint", "alone")):
            xs = np.linspace(x0, x0 + w, len(pair[name]))
            points = " ".join(f"{x:.1f},{y0 + h * (1 - v / top):.1f}" for x, v in zip(xs, pair[name]))
            parts.append(f'<polyline class="c{c}" points="{points}"/>')
    y = 30 + 110 * ((len(curves) + 1) // 2)
    parts.append(f'<text x="{left + wide + 40}" y="{y}">training reward by share of the answers: joint blue, alone'
                 " orange</text>")  # fmt: skip
    size = f"{left + wide + 350} {max(height, y + 10)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">{"".join(parts)}</svg>\n'


def table(found: dict[str, dict[str, dict]]) -> str:
    lines = ["| source | start | joint | gain | joint, other images | greedy: start | joint | joint, other images |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    cell = lambda x: "" if x is None else f"{x:.3f}"  # noqa: E731
    for kind, row in found.items():
        gain = row["drawn"]["gain"]
        parts = [cell(row[way][name]) for way in ("drawn", "greedy") for name in ("start", "joint", "shuffled")]
        parts.insert(2, f"{gain['mean']:+.3f} ± {1.96 * gain['error']:.3f}")
        lines.append(f"| {kind} | {' | '.join(parts)} |")
    return "\n".join(lines)


def compared(start: dict, joint: dict, kinds: Sequence[str]) -> dict[str, dict[str, dict]]:
    """By source and way of answering: mean rewards; the gain, that left when joint sees another question's image, and
    that when both do; what either earns by seeing its own image rather than another's."""
    mean = lambda values: float(np.mean(list(values.values()))) if values else None  # noqa: E731
    found: dict[str, dict[str, dict]] = {}
    for kind in kinds:
        found[kind] = {}
        for way in ("drawn", "greedy"):
            a, b = start[kind], joint[kind]
            found[kind][way] = {
                "start": mean(a[way]), "joint": mean(b[way]), "gain": paired(a[way], b[way]),
                "start shuffled": mean(a[f"{way} shuffled"]), "shuffled": mean(b[f"{way} shuffled"]),
                "gain shuffled": paired(a[way], b[f"{way} shuffled"]),
                "gain both shuffled": paired(a[f"{way} shuffled"], b[f"{way} shuffled"]),
                "start by its image": paired(a[f"{way} shuffled"], a[way]),
                "joint by its image": paired(b[f"{way} shuffled"], b[way]),
            }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="a finished run of stage 3 that the start is tuned from")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/mixed"), help="folder of the runs")
    parser.add_argument("--start-steps", type=int, default=1500, help="of the start")
    parser.add_argument("--steps", type=int, default=300, help="of joint")
    parser.add_argument("--alone", nargs="*", default=list(ALONE), help="kinds that are trained alone as well")
    parser.add_argument("--questions", type=int, default=32, help="held-out questions a kind")
    parser.add_argument("--draws", type=int, default=4, help="answers drawn to each")
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON line; the plot goes beside it")
    args = parser.parse_args()
    runs = args.runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    _compilation_cache()
    cfg = load(EXPERIMENT)
    start = f"init_from={runs / 'start'}"
    train(runs / "start", f"{EXPERIMENT}:role=start", f"init_from={args.init}", f"steps={args.start_steps}")
    train(runs / "joint", EXPERIMENT, start, f"steps={args.steps}")
    kinds = list(cfg.data.weights)
    before, after = (rewards(runs / name, kinds, args.questions, args.draws) for name in ("start", "joint"))
    found = compared(before, after, kinds)
    print(table(found))
    steps = {kind: _alone_steps(kind, args.steps, cfg) for kind in args.alone}
    for kind in args.alone:
        train(runs / f"alone_{kind}", f"{EXPERIMENT}:task={kind}", start, f"steps={steps[kind]}")

    visual = [kind for kind in kinds if len(before[kind]["drawn shuffled"]) > args.questions // 2]
    lost = [kind for kind in kinds if found[kind]["drawn"]["gain"]["mean"] < 0]
    again = asked_again(runs / "start", runs / "joint", lost, args.questions, args.draws)
    record = {"verdict": {}, "visual": {}, "asked again": again}
    for way in ("drawn", "greedy"):
        record["verdict"][way] = verdict({kind: found[kind][way]["gain"] for kind in kinds})
        names = ("gain", "gain shuffled", "gain both shuffled", "start by its image", "joint by its image")
        for name in names:
            seen = {kind: found[kind][way][name] for kind in visual}
            record["visual"][f"{way}: {name}"] = verdict(seen)
    alone = {kind: rewards(runs / f"alone_{kind}", [kind], args.questions, args.draws)[kind] for kind in args.alone}
    runs_of = {kind: {"joint": runs / "joint", "alone": runs / f"alone_{kind}"} for kind in args.alone}
    curves = {kind: {name: curve(run, kind) for name, run in pair.items()} for kind, pair in runs_of.items()}
    record["alone"] = {
        kind: {
            "steps": steps[kind], "attempts": attempts(runs_of[kind]["alone"]), "curves": curves[kind],
            "oscillation": {name: oscillation(values) for name, values in curves[kind].items()},
            "gain": {way: paired(before[kind][way], alone[kind][way]) for way in ("drawn", "greedy")},
            "joint gain": {way: found[kind][way]["gain"] for way in ("drawn", "greedy")},
        }
        for kind in args.alone
    }  # fmt: skip
    print(json.dumps({name: record[name] for name in ("verdict", "asked again", "visual", "alone")}, indent=1))
    if args.out:
        meta = json.loads((runs / "joint" / "meta.json").read_text())
        r = cfg.rollout
        budget = {name: {"attempts": attempts(runs / name)} for name in ("start", "joint")}
        budget["joint"] |= {"steps": args.steps, "answers": args.steps * r.prompts * r.group}
        about = {"budget": budget, "questions": args.questions, "draws": args.draws, "visual kinds": visual}
        line = about | record | {"sources": found} | {name: meta[name] for name in ("jax", "devices", "host")}
        args.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
        shown = {kind: row["drawn"] for kind, row in found.items()}
        args.out.with_suffix(".svg").write_text(plot(shown, curves), encoding="utf-8")


def _alone_steps(kind: str, steps: int, cfg: Any) -> int:
    """As many questions of a kind as `joint` asks in so many steps, in the batches of the run alone."""
    prompts = load(f"{EXPERIMENT}:task={kind}").rollout.prompts
    share = cfg.data.weights[kind] / sum(cfg.data.weights.values())
    return max(1, round(steps * cfg.rollout.prompts * share / prompts))


def _compilation_cache() -> None:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path("~/.cache/glmv_jax/xla").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


if __name__ == "__main__":
    main()
