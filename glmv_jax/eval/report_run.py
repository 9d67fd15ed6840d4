"""Reads what training left in a run directory; the report's only view of it.

    RUN/<stage>/config.json     the resolved flat config
                meta.json       stage, versions, devices, host, params
                metrics.jsonl   {"step", "wall", "kind": "train" | "eval", "<name>": float, ...} a line
                results.json    {"metrics": {"<name>": {"untrained", "trained", "chance", "note"}}, "seconds", "flops",
                                "samples", "tokens", "goodput": {"goodput", "seconds": {part: seconds}, "attempts"}}:
                                written last, so its presence says that the stage is finished
                samples/        samples.jsonl and the pictures that it names
                goodput.jsonl   where the time of each attempt went, and the signal that ended it, see `eval.goodput`
                faults.jsonl    {"source", "reason", ...}: a record that could not be used, a line
                nonfinite/      a batch whose update was left out a file

In metrics.jsonl are rows of kind "spike" too: a loss far above those before it, see `train.spikes`. A stage that has
not run, is half done, or was cut off in the middle of a line is shown as far as it got.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

from glmv_jax.eval import goodput

# In the order they run; what each does, in a line.
STAGES = {
    "teacher": "a small SigLIP image tower, the semantic teacher of stage 1",
    "mim": "stage 1: fill in masked patches as two teachers see them",
    "siglip": "stage 2: images meet their names in Chinese and English",
    "pretrain": "stage 3: next-token prediction and MMTP on captions, documents, charts and text",
    "sft": "stage 4: questions and answers in the chat template",
    "rl": "stage 5: GRPO on answers that rules can grade",
    "sft_more": "control: the wall time of stage 5 spent on more SFT",
}

Point = tuple[float, float]  # (step, value)


@dataclasses.dataclass
class StageRun:
    """One stage as far as it got. attempts: rows of goodput.jsonl; skipped: names of the batches in nonfinite/;
    problems: lines for the reader about files that could not be read."""

    name: str
    folder: pathlib.Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    attempts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    faults: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def status(self) -> str:
        if self.results:
            return "finished"
        return f"stopped at step {self.last_step}" if self.metrics else "not run yet"

    @property
    def last_step(self) -> int:
        """That metrics.jsonl has a row of; 0 before there is one."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def seconds(self) -> float:
        walls = (row["wall"] for row in self.metrics if is_number(row.get("wall")))
        return self.results.get("seconds") or max(walls, default=0.0)

    @property
    def stage(self) -> str:
        """mim, siglip ...; "" where no file says it."""
        return str(self.config.get("stage") or self.meta.get("stage") or "")

    @property
    def time(self) -> dict[str, Any]:
        """As `goodput.summary`: of the attempts, or else as the results have it."""
        return goodput.summary(self.attempts) if self.attempts else self.results.get("goodput", {})

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        return [row for row in self.metrics if row.get("kind", "train") == kind]

    def result(self, name: str, field: str = "trained") -> float | None:
        """One number of results.json, None where there is none."""
        return self.results.get("metrics", {}).get(name, {}).get(field)

    def curves(self) -> dict[tuple[str, str], list[Point]]:
        """(metric, "train" | "eval") -> its points by step. After a resume the last value written for a step counts."""
        return self._curves

    @functools.cached_property
    def _curves(self) -> dict[tuple[str, str], list[Point]]:
        table: dict[tuple[str, str], dict[float, float]] = {}
        for kind in ("train", "eval"):
            for row in self.rows(kind):
                for name, value in row.items():
                    if is_number(value) and name not in ("step", "wall"):
                        table.setdefault((name, kind), {})[row["step"]] = float(value)
        return {key: sorted(points.items()) for key, points in table.items()}


def is_number(value: Any) -> bool:
    """A finite one; JSON's true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read(root: str | pathlib.Path) -> dict[str, StageRun]:
    """Every stage of the recipe in order, then any other stage folder found in the run directory."""
    root = pathlib.Path(root)
    others = sorted(path.parent.name for path in root.glob("*/metrics.jsonl") if path.parent.name not in STAGES)
    return {name: read_stage(name, root / name) for name in (*STAGES, *others)}


def is_run(folder: pathlib.Path) -> bool:
    """Whether `glmv train` has worked there."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "meta.json"))


def read_stage(name: str, folder: pathlib.Path) -> StageRun:
    """One work directory, as far as it can be read."""
    run = StageRun(name, folder)
    run.config = _read_object(run, "config.json")
    run.meta = _read_object(run, "meta.json")
    run.results = _read_object(run, "results.json")
    run.metrics = [row for row in _read_lines(run, "metrics.jsonl") if is_number(row.get("step"))]
    kinds = {"image": str, "images": list, "boxes": list}
    run.samples = [{key: x for key, x in row.items() if isinstance(x, kinds.get(key, object))}
                   for row in _read_lines(run, "samples/samples.jsonl")]  # fmt: skip
    run.attempts = [row for row in _read_lines(run, "goodput.jsonl") if goodput.is_row(row)]
    run.faults = _read_lines(run, "faults.jsonl")
    run.skipped = sorted(path.stem for path in folder.glob("nonfinite/*.npz"))
    return run


# What files hold where it is numbers or more, and is counted on by who reads them: anything else is left out.
_NUMBERS = {"results.json": ("seconds", "train_seconds", "flops", "samples", "tokens", "skipped", "step_memory"),
            "meta.json": ("params",)}  # fmt: skip
_GROUPS = {"results.json": ("metrics", "goodput", "sources"), "meta.json": ("host", "versions")}


def _read_object(run: StageRun, name: str) -> dict[str, Any]:
    text = _text(run, name)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        value = error
    if not isinstance(value, dict):
        run.problems.append(f"{name} cannot be read")
        return {}
    wrong = [key for key in _NUMBERS.get(name, ()) if not is_number(value.get(key, 0))]
    wrong += [key for key in _GROUPS.get(name, ()) if not isinstance(value.get(key, {}), dict)]
    wrong += [] if goodput.is_summary(value.get("goodput", {})) or "goodput" in wrong else ["goodput"]
    value = {key: x for key, x in value.items() if key not in wrong}
    for key in ("metrics", "sources") if name == "results.json" else ():
        kept = {inner: x for inner, x in value.get(key, {}).items() if isinstance(x, dict)}
        wrong += [key] * (kept != value.get(key, {}))
        value |= {key: kept} if key in value else {}
    run.problems += [f"{name}: {key} is not what it should be, and is left out" for key in wrong]
    return value


def _text(run: StageRun, name: str) -> str | None:
    """What a file holds; None for none, or one that cannot be opened."""
    path = run.folder / name
    if not path.exists():
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        run.problems.append(f"{name} cannot be read ({error.strerror})")
        return None


def _read_lines(run: StageRun, name: str) -> list[dict[str, Any]]:
    rows, bad = [], 0
    for line in (_text(run, name) or "").splitlines():
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = False
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += row is not None
    if bad:
        run.problems.append(f"{bad} unreadable line{'s' * (bad > 1)} of {name} passed over")
    return rows
