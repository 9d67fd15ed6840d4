"""What does the quickstart reach, and how much of it is luck? The mean and the range of runs that differ in their seed.

    for s in 0 1 2; do bash launch/quickstart.sh runs/seed$s $s; done
    python benchmarks/seeds.py runs/seed0 runs/seed1 runs/seed2 [--out benchmarks/results/seeds.json]

Prints the table of the README, in Markdown; --out keeps every number of every run as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence

from glmv_jax.train.checkpoint import load_config

STAGES = ("teacher", "mim", "siglip", "pretrain", "sft", "rl", "sft_more")
QUERIES = {"en name": "English name", "zh name": "Chinese name", "zh name+keywords": "Chinese name and keywords"}


class Run:
    """A finished quickstart: results by stage."""

    def __init__(self, folder: pathlib.Path):
        missing = [stage for stage in STAGES if not (folder / stage / "results.json").is_file()]
        if missing:
            raise SystemExit(f"seeds.py: {folder} has no finished stage {missing[0]}; run the quickstart there first")
        self.results = {stage: json.loads((folder / stage / "results.json").read_text()) for stage in STAGES}
        self.meta = json.loads((folder / "rl" / "meta.json").read_text())
        self.tasks = sorted(load_config(folder / "rl").data.weights)  # those that RL trains

    def value(self, stage: str, metric: str, field: str = "trained") -> float:
        return self.results[stage]["metrics"][metric][field]

    def over_tasks(self, stage: str, kind: str, field: str = "trained") -> float:
        return sum(self.value(stage, f"{kind}/{task}", field) for task in self.tasks) / len(self.tasks)

    @property
    def minutes(self) -> float:
        return sum(result["seconds"] for result in self.results.values()) / 60


def rows(chance: Callable[[str], float]) -> list[tuple[str, Callable[[Run], float] | None, Callable[[Run], float]]]:
    """(what, the number to compare with or None, the number)."""
    both = lambda stage, metric: (  # noqa: E731
        lambda run: run.value(stage, metric, "untrained"), lambda run: run.value(stage, metric))  # fmt: skip
    table = [
        ("1 mim: loss at masked patches, untrained", *both("mim", "heldout/loss")),
        ("1 mim: nearest-neighbour probe of the encoder, untrained", *both("mim", "knn")),
        ("2 siglip: the same probe, after stage 1", *both("siglip", "knn")),
    ]
    for query, name in QUERIES.items():
        for way in (f"{query} -> image", f"image -> {query}"):
            shown = way.replace(query, name).replace("->", "→")
            for at in ("R@1", "R@5"):
                metric = f"{way} {at}"
                table.append((f"2 siglip: {shown} {at}, chance {chance(metric):.3f}", *both("siglip", metric)))
    table += [
        ("3 pretrain: loss, without the image", lambda run: run.value("pretrain", "heldout loss without image"),
         lambda run: run.value("pretrain", "heldout loss")),
        ("3 pretrain: MMTP drafts that are right", None, lambda run: run.value("pretrain", "heldout mtp_accuracy")),
    ]  # fmt: skip
    for kind, how in (("accuracy", "greedy"), ("accuracy_sampled", "drawn")):
        mean = lambda stage, kind=kind: lambda run: run.over_tasks(stage, kind)  # noqa: E731
        gain = lambda stage, kind=kind: lambda run: run.over_tasks(stage, kind) - run.over_tasks("sft", kind)  # noqa: E731
        table += [
            (f"5 rl: accuracy, {how} answers, after stage 4", mean("sft"), mean("rl")),
            (f"5 rl: gain, {how} answers", None, gain("rl")),
            (f"control: the same time of SFT, {how} answers, after stage 4", mean("sft"), mean("sft_more")),
        ]
    table += [
        ("5 rl: accuracy with shuffled images, best constant answer",
         lambda run: run.over_tasks("rl", "accuracy", "chance"), lambda run: run.over_tasks("rl", "accuracy_shuffled")),
        ("5 rl: accuracy with grey images", None, lambda run: run.over_tasks("rl", "accuracy_blind")),
        ("minutes of all stages", None, lambda run: run.minutes),
    ]  # fmt: skip
    return table


def span(values: Sequence[float]) -> str:
    """Mean and range."""
    digits = 1 if max(map(abs, values)) >= 10 else 3
    low, mean, high = (f"{x:.{digits}f}" for x in (min(values), sum(values) / len(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run directories of finished quickstarts")
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON line")
    args = parser.parse_args()
    runs = [Run(folder) for folder in args.runs]
    table = rows(lambda metric: runs[0].value("siglip", metric, "chance"))
    print("| held-out data; mean (range) | compared with | trained |\n|---|---|---|")
    record = {}
    for what, other, number in table:
        compared = [other(run) for run in runs] if other else []
        record[what] = {"compared": compared, "trained": [number(run) for run in runs]}
        print(f"| {what} | {span(compared) if compared else ''} | {span(record[what]['trained'])} |")
    if args.out:
        line = {"runs": [{name: run.meta[name] for name in ("jax", "devices", "host")} for run in runs]}
        args.out.write_text(json.dumps(line | {"numbers": record}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
