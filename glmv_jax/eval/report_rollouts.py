"""What a run of reinforcement learning left beside its metrics, for the report: answers with their pictures, and when
each part of the pipeline worked.

    RUN/<stage>/samples.jsonl   rows of `rl.pipeline.samples`: "prompt" says what a group was asked, "sample" an answer
                pictures/       HASH.png
                trace.json      when each part of a step worked, as Perfetto opens it

Of a large samples.jsonl the beginning and the end are read.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from glmv_jax.data import coordinates
from glmv_jax.data.chat import parse_answer
from glmv_jax.eval.report_run import Point, StageRun
from glmv_jax.eval.report_tables import Cell, Table, number, share

READ = 8 << 20  # bytes of each end of samples.jsonl
STEPS_SHOWN = 6  # of the pipeline

# Of each source by step: name of the metric -> what it is called here, and whether more is better (None: neither).
BY_SOURCE: dict[str, tuple[str, bool | None]] = {
    "reward": ("reward", True),
    "pass": ("pass@k", True),
    "accuracy": ("right, share", True),
    "format": ("well-formed, share", True),
    "length": ("length, tokens", None),
    "truncated": ("truncated, share", False),
    "mismatch": ("engine to trainer, KL", None),
    "staleness": ("staleness, updates", None),
    "timeout": ("graders out of time, share", False),
    "aborted": ("aborted answers", None),
}
IN_TABLE = {
    "pass": "pass@k", "length": "length", "truncated": "truncated", "mismatch": "mismatch KL", "staleness": "staleness",
    "timeout": "timeouts", "aborted": "aborted",
}  # fmt: skip
Curves = dict[str, dict[str, list[Point]]]  # key of BY_SOURCE, or part of the reward -> source -> points


@dataclasses.dataclass
class Group:
    """A prompt and the answers to it, best first: rows of samples.jsonl."""

    prompt: dict[str, Any]
    answers: list[dict[str, Any]]


@dataclasses.dataclass
class Pipeline:
    """Of the last steps of a trace, seconds from the first one's begin.

    busy: stage -> [(begin, end)] in which it worked.   numbers: of the whole trace, as `Trace.to_json` has them.
    """

    busy: dict[str, list[tuple[float, float]]]
    seconds: float
    steps: list[tuple[str, float]]
    numbers: dict[str, float]


def curves(run: StageRun) -> Curves:
    """By metric and source, parts of the reward as "component/<name>"; nothing for a run without rollouts."""
    table = {name: points for (name, kind), points in run.curves().items() if kind == "train"}
    under = lambda metric: {n.removeprefix(f"{metric}/"): p for n, p in table.items() if n.startswith(f"{metric}/")}  # noqa: E731
    sources = set(under("reward")) & set(under("length")) - {"mean"}
    found: Curves = {}
    parts = sorted({"/".join(name.split("/")[:2]) for name in table if name.startswith("component/")})
    for metric in (*BY_SOURCE, *parts):
        by = under(metric)
        if metric == "pass":  # of the group size that most steps had
            sizes = sorted({name.partition("/")[0] for name in table if name.startswith("pass@")}, key=_size)
            by = {}
            for size in sizes:
                by |= {name: p for name, p in under(size).items() if len(p) >= len(by.get(name, ()))}
        if metric == "mismatch":  # as the update found it, where the rows do not tell
            by = under("mismatch_kl") | by
        chosen = {source: by[source] for source in sorted(sources) if source in by}
        if chosen:
            found[metric] = chosen
    return found


def label(metric: str) -> str:
    """What a metric is called on the page."""
    return BY_SOURCE[metric][0] if metric in BY_SOURCE else metric.replace("component/", "part of the reward: ")


def _size(name: str) -> int:
    return int(name.removeprefix("pass@"))


def table(found: Curves) -> Table | None:
    """A row a source: the first tenth of its steps and the last."""
    if not found:
        return None
    columns = [metric for metric in IN_TABLE if metric in found]
    rows = []
    for source in sorted(found["reward"]):
        first, last = ends(found["reward"][source])
        tone = "" if first == last else "good" if last > first else "bad"
        row = [Cell(source), Cell(str(len(found["reward"][source]))), Cell(_course(first, last), tone)]
        row.append(Cell(f"{last - first:+.3f}", tone))
        rows.append(row + [_cell(metric, found[metric].get(source, [])) for metric in columns])
    header = ["source", "steps", "reward", "gain", *(IN_TABLE[metric] for metric in columns)]
    note = (
        "Of what was drawn to learn from: means of the first tenth of a source's steps → of the last. Timeouts of "
        "graders and aborted answers: of all steps."
    )
    return Table("By data source", header, rows, note)


def _cell(metric: str, points: list[Point]) -> Cell:
    """Of all steps for what seldom happens, else of the first and the last ones."""
    if not points:
        return Cell("–", "quiet")
    if metric == "aborted":
        return Cell(f"{sum(value for _, value in points):.0f}")
    if metric == "timeout":
        return Cell(share(sum(value for _, value in points), len(points)))
    first, last = ends(points)
    better = BY_SOURCE[metric][1]
    moved = better is not None and first != last
    return Cell(_course(first, last), "" if not moved else "good" if (last > first) == better else "bad")


def _course(first: float, last: float) -> str:
    return f"{number(first)} → {number(last)}"


def ends(points: list[Point]) -> tuple[float, float]:
    """Means of the first tenth of the points and of the last, one point at least."""
    n = max(1, len(points) // 10)
    mean = lambda part: sum(value for _, value in part) / len(part)  # noqa: E731
    return mean(points[:n]), mean(points[-n:])


# --- answers ----------------------------------------------------------------------------------------------------------


def groups(folder: pathlib.Path) -> dict[str, list[Group]]:
    """source -> [one of its first groups, one of its last], of those whose rewards differ where there are such, and
    whose pictures are there; a source that was met once has one."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, list[Group]] = {}
    for number_, rows in enumerate(_both_ends(path)):
        asked = {row["uid"]: row for row in rows if row.get("kind") == "prompt"}
        answers: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            if row.get("kind") == "sample" and row.get("uid") in asked:
                answers.setdefault(row["uid"], []).append(row)
        by: dict[str, list[Group]] = {}
        for uid, members in answers.items():
            members.sort(key=lambda row: -row["reward"])
            by.setdefault(asked[uid]["source"], []).append(Group(asked[uid], members))
        for source, mine in by.items():
            mine = mine if number_ == 0 else mine[::-1]
            chosen = min(mine[:200], key=lambda group: (not _seen(folder, group), not _differ(group)))
            if not any(group.prompt["uid"] == chosen.prompt["uid"] for group in found.get(source, [])):
                found.setdefault(source, []).append(chosen)
    return dict(sorted(found.items()))


def _seen(folder: pathlib.Path, group: Group) -> bool:
    return all((folder / "pictures" / f"{name}.png").is_file() for name in group.answers[0].get("images", ()))


def _differ(group: Group) -> bool:
    return group.answers[0]["reward"] > group.answers[-1]["reward"]


def _both_ends(path: pathlib.Path) -> list[list[dict[str, Any]]]:
    """Rows of the beginning and of the end of a file, which are all of it twice where it is small. Lines that cannot be
    read, as that which a kill cut off, are left out."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(READ)
        file.seek(max(0, size - READ))
        tail = file.read(READ)
    return [_rows(head), _rows(tail)]


def _rows(data: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def marks(group: Group) -> list[dict[str, Any]]:
    """Boxes and points to draw: of the gold answer and of the best one, where the question is about places."""
    if not group.prompt.get("places"):
        return []
    said = {"gold": group.prompt.get("gold", ""), "model": parse_answer(group.answers[0].get("text", ""))}
    found = []
    for role, text in said.items():
        found += [{"role": role, "box": list(box)} for box in coordinates.parse_boxes(text)]
        found += [{"role": role, "point": list(point)} for point in coordinates.parse_points(text)]
    return found


# --- the pipeline -----------------------------------------------------------------------------------------------------


def pipeline(folder: pathlib.Path) -> Pipeline | None:
    """None without a trace that can be read."""
    try:
        trace = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
        spans = [(e["cat"], e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)
                 for e in trace["traceEvents"] if e["ph"] == "X"]  # fmt: skip
        numbers = {name: float(value) for name, value in trace["otherData"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    trained = sorted((begin, end, name) for stage, name, begin, end in spans if stage == "train")[-STEPS_SHOWN:]
    if not trained:
        return None
    zero, last = trained[0][0], trained[-1][1]
    busy: dict[str, list[tuple[float, float]]] = {}
    for stage, _, begin, end in sorted(spans, key=lambda span: span[2]):
        if end <= zero or begin >= last:
            continue
        begin, end = max(begin, zero) - zero, min(end, last) - zero
        mine = busy.setdefault(stage, [])
        if mine and begin <= mine[-1][1]:
            mine[-1] = mine[-1][0], max(end, mine[-1][1])
        else:
            mine.append((begin, end))
    return Pipeline(busy, last - zero, [(name, begin - zero) for begin, _, name in trained], numbers)
