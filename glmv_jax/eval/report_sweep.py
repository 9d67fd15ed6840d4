"""Reads a sweep's directory (see `train.sweep`) and says what its arms differ in: numbers over seeds and tables.

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
from glmv_jax.eval.report_tables import Cell, Table, duration, number, quantity
from glmv_jax.eval.statistics import Spread, Steadiness, paired, spread, steadiness
from glmv_jax.typing import UserError

FILE = "sweep.json"
SHOWN = 10  # metrics of the terminal's tables; the page has all
_STRAYS = "strays of "
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
        found |= {f"{_STRAYS}{name}": stray(points).sd for name, points in self.learnt.items()}
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
    return name.endswith(_RATES) or name == "lr" or name.startswith("lr/")


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


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(sweep: Sweep, shown: int | None = None) -> list[Table]:
    """shown: how many metrics, None: all."""
    names = metrics(sweep)
    values = [name for name in names if not name.startswith(_STRAYS)]  # those have a table of their own
    parts = [runs_table(sweep)]
    if names:
        parts += [final_table(sweep, values[:shown], len(values)), *difference_table(sweep, names[:shown])]
        parts += [steadiness_table(sweep), *head_table(sweep), cost_table(sweep)]
    return parts


def runs_table(sweep: Sweep) -> Table:
    """Arms by how many of their runs are over, and what went wrong."""
    rows = []
    for arm in sweep.arms:
        states = [m.record.get("status", "?") if not m.finished else "finished" for m in arm.members]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        seeds = ", ".join(str(member.seed) for member in arm.members)
        rows.append([Cell(arm.label, "head"), Cell(seeds), Cell(counted, "" if set(states) == {"finished"} else "bad")])
        rows += [
            [Cell(""), Cell(str(m.seed), "quiet"), Cell(m.record["error"][:160], "quiet")]
            for m in arm.members if m.record.get("error") and not m.finished
        ]  # fmt: skip
    return Table("Runs", ["arm", "seeds", "runs"], rows)


def final_table(sweep: Sweep, names: list[str], of: int) -> Table:
    rows = []
    for name in names:
        for i, arm in enumerate(arm for arm in sweep.arms if arm.by_seed(name)):
            found = spread(list(arm.by_seed(name).values()))
            rows.append([
                Cell("" if i else name, "" if i else "head"), Cell(arm.label), Cell(number(found.mean)),
                Cell(number(found.sd)), Cell(_interval(found)), Cell(str(found.n), "quiet"),
            ])  # fmt: skip
    note = (
        "Of finished runs. Held-out numbers after training; train X: the mean of the training metric over the last "
        "tenth of the steps logged. sd: over seeds. Interval: of the mean, 95 %, Student's t."
    )
    rest = f" {of - len(names)} more metrics are in report.html." if of > len(names) else ""
    return Table("Final values", ["metric", "arm", "mean", "sd", "interval", "seeds"], rows, note + rest)


def difference_table(sweep: Sweep, names: list[str]) -> list[Table]:
    """One, or none where there is nothing to compare."""
    rows = []
    for name in names:
        found = [(a, b, paired(a.by_seed(name), b.by_seed(name))) for a, b in pairs(sweep)]
        for i, (a, b, d) in enumerate(row for row in found if row[2] is not None):
            tone = {True: "head", False: "quiet", None: "quiet"}[d.differs]
            rows.append([
                Cell("" if i else name, "" if i else "head"), Cell(f"{a.label} − {b.label}"),
                Cell(_signed(d.mean), tone), Cell(_interval(d, signed=True), tone), Cell(str(d.n), "quiet"),
            ])  # fmt: skip
    note = (
        "Runs of the same seed are subtracted, then averaged: the batches and the first parameters cancel. Bold: the "
        "95 % interval leaves 0 out, which by chance alone one in twenty does. Strays: see Steadiness."
    )
    header = ["metric", "arms", "difference", "interval", "seeds"]
    return [Table("Paired differences", header, rows, note)] if rows else []


def steadiness_table(sweep: Sweep) -> Table:
    rows = []
    for name in dict.fromkeys(name for member in sweep.members for name in member.learnt):
        for i, arm in enumerate(arm for arm in sweep.arms if arm.finished):
            found = [stray(m.learnt[name]) for m in arm.finished if name in m.learnt]
            if found:
                rows.append([
                    Cell("" if i else name, "" if i else "head"), Cell(arm.label),
                    Cell(number(plain.fmean(one.sd for one in found))), Cell(number(max(one.jump for one in found))),
                    Cell(number(seed_spread(arm, name))),
                ])  # fmt: skip
    note = (
        "Over the last third of the steps. Strays: root mean square of the training metric minus its running mean "
        "(over about a twentieth of the run), mean over seeds. Largest rise: above that mean, of any seed. Between "
        "seeds: standard deviation at the same step, root mean square over the steps."
    )
    return Table("Steadiness", ["metric", "arm", "strays", "largest rise", "between seeds"], rows, note)


def head_table(sweep: Sweep) -> list[Table]:
    """How good the drafts of the MTP head are; none for stages without one."""
    rows, measured = [], False
    for arm in sweep.arms:
        agree, right = (arm.by_seed(f"heldout mtp_{name}") for name in ("agreement", "accuracy"))
        found = [list(arm.by_seed(f"accept length {kind}").values()) for kind in ("text", "image")]
        measured = measured or any(found)
        if agree or any(found):
            columns = [list(agree.values()), list(right.values()), *found]
            rows.append([Cell(arm.label, "head"), *(_mean_sd(column) for column in columns)])
    note = (
        "Mean (sd over seeds), held-out. Agreement: how often the first draft is the token that the main head would "
        "say, which is when greedy decoding takes it. Accept length: tokens a step of speculative decoding, after a "
        "prompt of text alone and after one with images" + ("." if measured else "; not measured in these runs.")
    )
    header = ["arm", "agreement", "right", "accept length, text", "accept length, image"]
    return [Table("Drafts of the MTP head", header, rows, note)] if rows else []


def cost_table(sweep: Sweep) -> Table:
    rows = []
    for arm in sweep.arms:
        done = arm.finished
        steps = [seconds for m in done if (seconds := m.step_seconds)]
        tokens = [m.stage.results["tokens"] / s for m in done if (s := m.stage.results.get("train_seconds"))]
        memory = [m.record["peak_rss"] for m in done if m.record.get("peak_rss")]
        needed = [m.stage.results["step_memory"] for m in done if m.stage.results.get("step_memory")]
        rows.append([
            Cell(arm.label, "head"), Cell(f"{1e3 * plain.fmean(steps):.4g} ms" if steps else "–"),
            Cell(quantity(plain.fmean(tokens) if tokens else None)),
            Cell(f"{max(memory) / 2**30:.2f} GiB" if memory else "–"),
            Cell(f"{max(needed) / 2**20:,.0f} MiB" if needed else "–"),
            Cell(duration(plain.fmean(m.stage.seconds for m in done)) if done else "–"),
            Cell(quantity(done[0].stage.meta.get("params")) if done else "–"),
        ])  # fmt: skip
    note = (
        "A step: median over a run, mean over seeds. Host memory: the most that a run's process held, of any seed. "
        "Step memory: what the compiled step needs of a device, by the compiler. A run: everything, evaluations and "
        "compilation too."
    )
    header = ["arm", "a step", "tokens/s", "host memory", "step memory", "a run", "params"]
    return Table("Time and memory", header, rows, note)


def _interval(found: Spread, *, signed: bool = False) -> str:
    if found.low is None:
        return "–"
    text = _signed if signed else number
    return f"{text(found.low)} to {text(found.high)}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{_fine(value)}".replace("-", "−")


def _fine(value: float) -> str:
    """Differences need a place more than what they are between."""
    return f"{value:.4f}" if 5e-4 <= abs(value) < 10 else number(value)


def _mean_sd(values: list[float]) -> Cell:
    if not values:
        return Cell("–", "quiet")
    found = spread(values)
    return Cell(number(found.mean) + (f" ({number(found.sd)})" if found.sd is not None else ""))
