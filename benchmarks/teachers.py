"""What does each teacher of stage 1 bring? Semantic alone, texture alone, both, and no stage 1 at all.

    python benchmarks/teachers.py --runs runs/teachers [--seeds 0 1 2] [--jobs 1] [--out FILE.json]

For each seed the semantic teacher is trained first, then stage 1 with each choice of teachers, then the same stage 2
from each. The numbers are those of the held-out concepts: the nearest-neighbour probe of the encoder after stage 1 and
after stage 2, and retrieval after stage 2 as the mean of its six directions. Prints a table in Markdown; --out keeps
every number as one line of JSON and draws them beside it, as .svg. About 55 minutes for three seeds on two CPU cores.
Stop it whenever you like: the same command goes on, and finished runs are passed over.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import sys
from collections.abc import Sequence

from glmv_jax.eval.report_svg import dot_panel
from glmv_jax.train.sweep.child import Child, train_command

ARMS = {"none": "no stage 1", "semantic": "semantic only", "texture": "texture only", "both": "both"}
PANELS = ("probe after stage 1", "probe after stage 2", "R@1 after stage 2", "R@5 after stage 2")
MIM, SIGLIP = "experiments/cogvit_mim.py:size=nano", "experiments/cogvit_siglip.py:size=nano"


def train(log: pathlib.Path, config: str, workdir: pathlib.Path, *overrides: str) -> None:
    """One `glmv train`; what it prints goes to `log`."""
    child = Child(log, train_command(config, workdir, overrides), apart=False)
    if code := child.wait():
        last = child.last_words(5)
        raise SystemExit(f"teachers.py: {workdir} ended with exit code {code}; its last words in {log}:\n{last}")
    print(f"{workdir}: done", file=sys.stderr, flush=True)


def teacher(runs: pathlib.Path, seed: int) -> None:
    folder = runs / f"seed{seed}"
    train(folder / "teacher.log", f"{SIGLIP},role=teacher", folder / "teacher", f"seed={seed}")


def arm(runs: pathlib.Path, seed: int, name: str, taught: concurrent.futures.Future) -> None:
    folder, start = runs / f"seed{seed}", []
    log = folder / f"{name}.log"
    if name in ("semantic", "both"):
        taught.result()
    if name != "none":
        path = [] if name == "texture" else [f"teachers.semantic.path={folder / 'teacher'}"]
        only = {"semantic": ",texture=false", "texture": ",semantic=false", "both": ""}[name]
        train(log, f"{MIM}{only}", folder / f"mim_{name}", f"seed={seed}", *path)
        start = [f"init_from={folder / f'mim_{name}'}"]
    train(log, SIGLIP, folder / f"siglip_{name}", f"seed={seed}", *start)


def numbers(runs: pathlib.Path, seed: int, name: str) -> dict[str, float]:
    """The four numbers of one run; without stage 1 the first is that of the untrained encoder."""
    read = lambda stage: json.loads((runs / f"seed{seed}" / stage / "results.json").read_text())["metrics"]  # noqa: E731
    siglip = read(f"siglip_{name}")
    mean = lambda at: [v["trained"] for key, v in siglip.items() if key.endswith(at)]  # noqa: E731
    before = siglip["knn"]["untrained"] if name == "none" else read(f"mim_{name}")["knn"]["trained"]
    recalls = [sum(values) / len(values) for values in (mean(" R@1"), mean(" R@5"))]
    return dict(zip(PANELS, (before, siglip["knn"]["trained"], *recalls), strict=True))


def table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"| teachers | {' | '.join(PANELS)} |", "|---" * (len(PANELS) + 1) + "|"]
    for name, rows in found.items():
        cells = []
        for panel in PANELS:
            values = [row[panel] for row in rows]
            cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {ARMS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, list[dict[str, float]]]) -> str:
    """A panel a number: a dot a seed, a bar at the mean. One SVG that needs nothing else."""
    wide, high = 230, 190
    parts = [
        "<style>text{font:10px sans-serif;fill:#444}.title{font-size:11px;font-weight:bold}.grid{stroke:#ddd}"
        ".mean{stroke:#222;stroke-width:2}.dot{fill:#3b6fb6;fill-opacity:.75}"
        "@media(prefers-color-scheme:dark){text{fill:#ccc}.grid{stroke:#444}.mean{stroke:#eee}}</style>"
    ]
    for n, panel in enumerate(PANELS):
        columns = {name: [row[panel] for row in rows] for name, rows in found.items()}
        parts += dot_panel(panel, columns, wide, high, x0=n * wide)
    size = f"{wide * len(PANELS)} {high}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">{"".join(parts)}</svg>\n'


def train_all(runs: pathlib.Path, seeds: Sequence[int], jobs: int) -> None:
    """Everything, `jobs` runs at a time; the first failure ends it."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for seed in seeds:
            (runs / f"seed{seed}").mkdir(parents=True, exist_ok=True)
        taught = {seed: pool.submit(teacher, runs, seed) for seed in seeds}  # first: some of the others wait for them
        runs_to_do = [pool.submit(arm, runs, seed, name, taught[seed]) for name in ARMS for seed in seeds]
        for done in concurrent.futures.as_completed([*taught.values(), *runs_to_do]):
            if done.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/teachers"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (each wants two cores)")
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON line; the plot goes beside it")
    args = parser.parse_args()
    runs = args.runs.absolute()
    train_all(runs, args.seeds, args.jobs)
    found = {name: [numbers(runs, seed, name) for seed in args.seeds] for name in ARMS}
    print(table(found))
    if args.out:
        meta = json.loads((runs / f"seed{args.seeds[0]}" / "siglip_both" / "meta.json").read_text())
        line = {"seeds": args.seeds, "numbers": found} | {name: meta[name] for name in ("jax", "devices", "host")}
        args.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
        args.out.with_suffix(".svg").write_text(plot(found), encoding="utf-8")


if __name__ == "__main__":
    main()
