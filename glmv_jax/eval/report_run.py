"""Reads what training left in a run directory; the report's only view of it.

    RUN/<stage>/config.json     the resolved flat config
                meta.json       stage, versions, devices, host, params
                metrics.jsonl   {"step", "wall", "kind": "train" | "eval", "<name>": float, ...} a line
                results.json    {"metrics": {"<name>": {"untrained", "trained", "chance", "note"}}, "seconds", "flops",
                                "samples", "tokens", "goodput": {"goodput", "seconds": {part: seconds}, "attempts"}}:
                                written last, so its presence says that the stage is finished
                samples/        samples.jsonl and the pictures that it names

A stage that has not run, is half done, or was cut off in the middle of a line is shown as far as it got.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

from glmv_jax.typing import UserError

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
    """One stage as far as it got. `problems` are lines for the reader about files that could not be read."""

    name: str
    folder: pathlib.Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def status(self) -> str:
        if self.results:
            return "finished"
        return f"stopped at step {self.metrics[-1]['step']}" if self.metrics else "not run yet"

    @property
    def seconds(self) -> float:
        return self.results.get("seconds") or (self.metrics[-1].get("wall", 0.0) if self.metrics else 0.0)

    def result(self, name: str, field: str = "trained") -> float | None:
        """One number of results.json, None where there is none."""
        return self.results.get("metrics", {}).get(name, {}).get(field)

    def curves(self) -> dict[tuple[str, str], list[Point]]:
        """(metric, "train" | "eval") -> its points by step. After a resume the last value written for a step counts."""
        table: dict[tuple[str, str], dict[float, float]] = {}
        for row in self.metrics:
            for name, value in row.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                if number and name not in ("step", "wall"):
                    table.setdefault((name, row.get("kind", "train")), {})[row["step"]] = float(value)
        return {key: sorted(points.items()) for key, points in table.items()}


def read(root: str | pathlib.Path) -> dict[str, StageRun]:
    """Every stage of the recipe in order, then any other stage folder found in the run directory.

    Raises:
        UserError: no such folder, or it is a single stage's work directory.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise UserError(f"no run directory {root}; bash launch/quickstart.sh makes one, or give --run")
    if (root / "metrics.jsonl").exists():
        raise UserError(f"{root} is the work directory of one stage; give the folder above it, --run {root.parent}")
    others = sorted(path.parent.name for path in root.glob("*/metrics.jsonl") if path.parent.name not in STAGES)
    return {name: read_stage(name, root / name) for name in (*STAGES, *others)}


def read_stage(name: str, folder: pathlib.Path) -> StageRun:
    """One work directory, as far as it can be read."""
    run = StageRun(name, folder)
    run.config = _read_object(run, "config.json")
    run.meta = _read_object(run, "meta.json")
    run.results = _read_object(run, "results.json")
    run.metrics = [row for row in _read_lines(run, "metrics.jsonl") if isinstance(row.get("step"), (int, float))]
    run.samples = _read_lines(run, "samples/samples.jsonl")
    return run


def _read_object(run: StageRun, name: str) -> dict[str, Any]:
    path = run.folder / name
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        value = error
    if not isinstance(value, dict):
        run.problems.append(f"{name} cannot be read")
        return {}
    return value


def _read_lines(run: StageRun, name: str) -> list[dict[str, Any]]:
    path = run.folder / name
    if not path.exists():
        return []
    rows, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = False
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += row is not None
    if bad:
        run.problems.append(f"{bad} unreadable line{'s' * (bad > 1)} of {name} passed over")
    return rows
