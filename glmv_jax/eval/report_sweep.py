"""Reads a sweep's directory (see `train.sweep`) and says what its arms differ in, as numbers over seeds.

An arm is everything that a sweep's runs share but the seed. Of each finished run these are compared:
    its held-out numbers, as results.json has them after training
    "train X": the mean of the training metric X over the last tenth of the steps that were logged
    "strays of X": how far X strays from its own running mean over the last third of the steps (root mean square)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics as plain
from collections.abc import Iterable
from typing import Any

from glmv_jax.eval.report_run import Point, StageRun, read_stage
from glmv_jax.eval.report_svg import running_mean
from glmv_jax.eval.statistics import Spread, Steadiness, paired, spread, steadiness
from glmv_jax.typing import UserError

FILE = "sweep.json"
STRAYS = "strays of "
_RATES = ("_per_second", "data_wait", "skipped")  # what a training row holds beside what is learnt


@dataclasses.dataclass
class Member:
    """A run of a sweep. record: what sweep.json says of it; stage: what its folder holds."""

    seed: int
    record: dict[str, Any]
    stage: StageRun

    @property
    def finished(self) -> bool:
        return bool(self.stage.results)

    @functools.cached_property
    def curves(self) -> dict[tuple[str, str], list[Point]]:
        """(metric, "train" | "eval") -> points."""
        return self.stage.curves()

    @functools.cached_property
    def learnt(self) -> dict[str, list[Point]]:
        """The training curves of what is learnt: the loss, its parts, and all that the MTP head says of itself."""
        return {name: points for (name, kind), points in self.curves.items() if kind == "train" and is_main(name)}

    @functools.cached_property
    def numbers(self) -> dict[str, float]:
        """Everything that a finished run is compared by; see the head of this file."""
        results = self.stage.results.get("metrics", {})
        found = {name: values.get("trained") for name, values in results.items()}
        for name, points in self.learnt.items():
            found[f"train {name}"] = plain.fmean(value for _, value in points[-max(1, len(points) // 10) :])
        found |= {f"{STRAYS}{name}": stray(points).sd for name, points in self.learnt.items()}
        return {name: float(x) for name, x in found.items() if isinstance(x, (int, float)) and math.isfinite(x)}

    @property
    def step_seconds(self) -> float | None:
        """The median over the rows of metrics.jsonl, each a mean over up to 50 steps without evaluations."""
        rates = [y for _, y in self.curves.get(("steps_per_second", "train"), []) if y > 0]
        return 1 / plain.median(rates) if rates else None


@dataclasses.dataclass
class Arm:
    """Runs that differ in their seed alone. label: short and unlike any other arm's."""

    label: str
    values: dict[str, Any]
    members: list[Member] = dataclasses.field(default_factory=list)

    @property
    def finished(self) -> list[Member]:
        return [member for member in self.members if member.finished]

    def by_seed(self, metric: str) -> dict[int, float]:
        """One number of each finished run that has it."""
        found = {member.seed: member.numbers.get(metric) for member in self.finished}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclasses.dataclass
class Sweep:
    root: pathlib.Path
    file: dict[str, Any]
    arms: list[Arm]

    @property
    def members(self) -> list[Member]:
        return [member for arm in self.arms for member in arm.members]


def is_sweep(root: str | pathlib.Path) -> bool:
    """Whether a sweep was begun in this folder."""
    return (pathlib.Path(root) / FILE).is_file()


def read(root: str | pathlib.Path) -> Sweep:
    """The sweep in a folder, finished or not.

    Raises:
        UserError: sweep.json is missing or cannot be read.
    """
    root = pathlib.Path(root)
    try:
        file = json.loads((root / FILE).read_text(encoding="utf-8"))
        records = file["runs"]
        swept = [key for key in dict.fromkeys(key for record in records for key in record["values"]) if key != "seed"]
        arms: dict[str, Arm] = {}
        for record in records:
            values = {key: value for key, value in record["values"].items() if key != "seed"}
            arm = arms.setdefault(json.dumps(values), Arm(_label(values, swept), values))
            stage = read_stage(record["name"], root / record["name"])
            arm.members.append(Member(record["values"].get("seed", 0), record, stage))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{root / FILE} cannot be read ({reason}); give a folder of glmv sweep") from error
    return Sweep(root, file, list(arms.values()))


def _label(values: dict[str, Any], swept: list[str]) -> str:
    if not values:
        return "all"
    if len(swept) == 1:
        return str(*values.values())
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())


def is_main(name: str) -> bool:
    """The loss or reward, its parts (ce, mtp) and theirs (mtp_after_image). Details: ce/KIND, accuracies, norms."""
    return name in ("loss", "reward/mean") or name.split("_")[0] in ("ce", "mtp") and not name.endswith("_accuracy")


def is_rate(name: str) -> bool:
    return name.endswith(_RATES) or name == "lr" or name.startswith(("lr/", "seen/"))


def stray(points: list[Point]) -> Steadiness:
    return steadiness(points, running_mean(points))


# --- numbers of arms --------------------------------------------------------------------------------------------------


def metrics(sweep: Sweep) -> list[str]:
    """Names of all numbers that some finished run has, in the order in which they are shown."""
    return list(dict.fromkeys(name for member in sweep.members if member.finished for name in member.numbers))


def pairs(sweep: Sweep) -> list[tuple[Arm, Arm]]:
    """Which arms are compared: each with each up to four, else each with the first."""
    arms = [arm for arm in sweep.arms if arm.finished]
    return list(itertools.combinations(arms, 2)) if len(arms) <= 4 else [(arm, arms[0]) for arm in arms[1:]]


def summary(sweep: Sweep) -> dict[str, Any]:
    """All of it as JSON can hold it: {"arms": {label: {metric: ...}}, "differences": {"label - label": {metric: ...}}},
    with the fields of `statistics.Spread`."""

    def row(found: Spread | None, **more: Any) -> dict[str, Any] | None:
        return None if found is None else found._asdict() | more

    names = metrics(sweep)
    arms: dict[str, Any] = {}
    for arm in sweep.arms:
        by_name = {name: arm.by_seed(name) for name in names}
        arms[arm.label] = {name: row(spread(list(v.values())), by_seed=v) for name, v in by_name.items() if v}
    differences = {
        f"{a.label} - {b.label}": {name: row(paired(a.by_seed(name), b.by_seed(name))) for name in names}
        for a, b in pairs(sweep)
    }
    return {"arms": arms, "differences": differences}


def common(curves: Iterable[list[Point]]) -> list[tuple[float, list[float]]]:
    """(step, the value of each curve there) for the steps that all of them have."""
    tables = [dict(points) for points in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(step, [table[step] for table in tables]) for step in steps]


def seed_spread(arm: Arm, name: str) -> float | None:
    """Standard deviation between seeds at the same step, root mean square over the last third of the steps."""
    rows = common(member.learnt.get(name, []) for member in arm.finished)
    if not rows or len(rows[0][1]) < 2:
        return None
    begin = rows[0][0] + 2 / 3 * (rows[-1][0] - rows[0][0])
    return math.sqrt(plain.fmean(plain.variance(values) for step, values in rows if step >= begin))
