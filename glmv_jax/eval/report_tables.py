"""The report's tables, made once and drawn twice: on the terminal (rich) and on the page (HTML).

Reinforcement learning is compared by metrics that sft, rl and sft_more share, named `accuracy/<task>`; the same
evaluation with shuffled images, with a grey image and with drawn answers is `accuracy_shuffled/<task>`,
`accuracy_blind/<task>` and `accuracy_sampled/<task>`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any, NamedTuple

from glmv_jax.eval.report_run import STAGES, StageRun

_LOWER_IS_BETTER = ("loss", "perplexity", "error", "nll", "smooth_l1")
_MTP_LOSS = re.compile(r"\bmtp(?!_)")  # which mtp_accuracy and mtp_agreement are not
_NO_DIRECTION = ("shuffled", "blind", "without image", "length", "entropy")
# Of each stage the number that says most about it; of one that has it not, its first.
_HEADLINES = {
    "teacher": "en name -> image R@5", "mim": "heldout/loss", "siglip": "en name -> image R@5",
    "pretrain": "heldout loss", "sft": "accuracy/mean", "rl": "accuracy/mean", "sft_more": "accuracy/mean",
}  # fmt: skip
_CONTROLS = ("accuracy_shuffled/", "accuracy_blind/", "accuracy_sampled/")
_PROGRESS = ("steps", "rollouts")  # parts of a run's time that goodput counts
# Columns that say what can be had without looking: (kind of accuracy, field of its result).
_UNSEEN = {
    "shuffled images": ("accuracy_shuffled", "trained"),
    "grey image": ("accuracy_blind", "trained"),
    "best constant": ("accuracy", "chance"),
}


class Cell(NamedTuple):
    """Text, how it is meant ("" plain, "good", "bad", "quiet" or "head", which opens a group of rows), and a remark.

    The remark is for the page; a terminal has no room for it.
    """

    text: str
    tone: str = ""
    remark: str = ""


@dataclasses.dataclass
class Table:
    """kind: how the page sets it: "results" (its second column is words) or "values" (long words, which are broken)."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""
    kind: str = ""


def short_table(stages: dict[str, StageRun]) -> Table:
    """A line a stage: its headline number on held-out data, and the time that it took."""
    rows = []
    for name, run in stages.items():
        metrics = run.results.get("metrics", {})
        metric = _HEADLINES.get(name, "") if _HEADLINES.get(name, "") in metrics else next(iter(metrics), "")
        subject = Cell(metric or run.status, "" if metric else "quiet", STAGES.get(name, ""))
        time = Cell(duration(run.seconds) if run.seconds else "–", "quiet")
        rows.append([Cell(name, "head"), subject, *_values(metric, metrics.get(metric, {})), time])
    header = ["stage", "what is measured", "untrained", "trained", "chance", "time"]
    return Table("In short", header, rows, kind="results")


def _values(metric: str, values: dict[str, Any]) -> list[Cell]:
    """Untrained, trained, chance; what got worse is marked."""
    untrained, trained = values.get("untrained"), values.get("trained")
    tone = {True: "good", False: "bad", None: ""}[improved(metric, untrained, trained)]
    return [Cell(number(untrained)), Cell(number(trained), tone), Cell(number(values.get("chance")), "quiet")]


def final_table(stages: dict[str, StageRun]) -> Table:
    """Held-out numbers of every stage: untrained, trained, chance. A number that got worse is marked."""
    rows = []
    for name, run in stages.items():
        metrics = {key: values for key, values in run.results.get("metrics", {}).items() if not is_detail(key)}
        if not metrics:
            nothing = "no held-out numbers" if run.results else run.status
            rows.append([Cell(name, "head"), Cell(nothing, "quiet"), *[Cell("–", "quiet")] * 3])
        for i, (metric, values) in enumerate(metrics.items()):
            first = Cell("" if i else name, "" if i else "head")
            rows.append([first, Cell(metric, remark=values.get("note") or ""), *_values(metric, values)])
    note = "Untrained: at the stage's first step, with what it took over from the stage before."
    return Table("Held-out results", ["stage", "metric", "untrained", "trained", "chance"], rows, note, "results")


def is_detail(metric: str) -> bool:
    """Single tasks under other conditions; their means stay."""
    return metric.startswith(_CONTROLS) and not metric.endswith("/mean")


def improved(metric: str, untrained: Any, trained: Any) -> bool | None:
    """Whether training moved the number the right way; None where that cannot be said."""
    values = (untrained, trained)
    if any(not isinstance(value, (int, float)) or not math.isfinite(value) for value in values):
        return None
    if any(word in metric for word in _NO_DIRECTION):
        return None
    falls = any(word in metric for word in _LOWER_IS_BETTER) or _MTP_LOSS.search(metric)
    return trained < untrained if falls else trained > untrained


def share_table(stages: dict[str, StageRun]) -> Table:
    """Each stage's part of the time and of the arithmetic."""
    seconds = sum(run.seconds for run in stages.values())
    flops = sum(run.results.get("flops") or 0 for run in stages.values())
    rows = []
    for name, run in stages.items():
        mine, spent = run.results.get("flops"), run.seconds
        rows.append([
            Cell(name, "head"),
            Cell(duration(spent) if spent else run.status, "" if spent else "quiet"),
            Cell(share(spent, seconds)), Cell(quantity(mine)), Cell(share(mine, flops)),
            Cell(quantity(mine / spent if mine and spent else None)),
            Cell(share(run.results.get("goodput", {}).get("goodput"), 1.0)),
            Cell(quantity(run.results.get("samples"))), Cell(quantity(run.results.get("tokens"))),
            Cell(quantity(run.meta.get("params"))),
        ])  # fmt: skip
    plain = [Cell("") for _ in range(5)]
    rows.append(
        [Cell("all", "head"), Cell(duration(seconds)), Cell(""), Cell(quantity(flops or None)), Cell(""), *plain]
    )
    header = ["stage", "time", "share", "FLOPs", "share", "FLOP/s", "goodput", "samples", "tokens", "params"]
    return Table("Time and arithmetic", header, rows, _lost_time(stages))


def _lost_time(stages: dict[str, StageRun]) -> str:
    """What goodput is, and where the rest of the time of all stages went, the largest parts first."""
    total: collections.Counter[str] = collections.Counter()
    for run in stages.values():
        total.update(run.results.get("goodput", {}).get("seconds", {}))
    spent = sum(total.values())
    rest = ", ".join(f"{part} {share(x, spent)}" for part, x in total.most_common() if part not in _PROGRESS)
    return f"Goodput: the share of the time in training steps and rollouts; the rest: {rest}." if rest else ""


def rl_tables(stages: dict[str, StageRun]) -> list[Table]:
    """Held-out accuracy by task before and after reinforcement learning, beside the controls; none until RL has run."""
    greedy = _rl_table(stages, "accuracy", _UNSEEN, "greedy answers")
    drawn = _rl_table(stages, "accuracy_sampled", {}, "answers drawn at temperature 1")
    return [table for table in (greedy, drawn) if table]


def _rl_table(stages: dict[str, StageRun], kind: str, controls: dict[str, tuple[str, str]], how: str) -> Table | None:
    """The tasks that were trained and their mean, then the tasks that were only looked at."""
    before, after, control = stages["sft"], stages["rl"], stages["sft_more"]
    prefix, weight = f"{kind}/", "data.weights."
    tasks = {name.removeprefix(prefix) for name in after.results.get("metrics", {}) if name.startswith(prefix)}
    tasks -= {"mean"}
    if not tasks:
        return None
    trained = {key.removeprefix(weight) for key in after.config if key.startswith(weight)} & tasks or tasks
    rows, columns = [], []
    for task in [*sorted(trained), *sorted(tasks - trained)]:
        first = before.result(prefix + task)
        first = after.result(prefix + task, "untrained") if first is None else first
        last = after.result(prefix + task)
        gain = None if first is None or last is None else last - first
        values = [first, last, gain, control.result(prefix + task)]
        values += [after.result(f"{other}/{task}", field) for other, field in controls.values()]
        rows.append(_rl_row(task if task in trained else f"{task} †", values))
        columns.append(values)
    known = [[value for value in column if value is not None] for column in zip(*columns[: len(trained)])]
    rows.insert(len(trained), _rl_row("mean", [sum(column) / len(column) if column else None for column in known]))
    header = ["task", "before", "after", "gain", "more SFT", *controls]
    note = "More SFT: instead of RL, for the same wall time."
    if controls:
        note += " Shuffled images, grey image: after RL; only what can be guessed is left."
        note += " Best constant: one answer to each task and language."
    if tasks - trained:
        note += " †: not trained in RL."
    return Table(f"Before and after reinforcement learning: {how}", header, rows, note)


def _rl_row(task: str, values: list[float | None]) -> list[Cell]:
    first, after, gain, *rest = values
    tone = "" if not gain else "good" if gain > 0 else "bad"
    sign = "" if gain is None else f"{gain:+.3f}"
    cells = [Cell(number(first)), Cell(number(after), tone), Cell(sign, tone), *(Cell(number(value)) for value in rest)]
    return [Cell(task, "head" if task == "mean" else ""), *cells]


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """A metric as text: 0.044, 12.3, 1,849; a dash for nothing."""
    if not isinstance(value, (int, float)):
        return "–"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and size < 5e-4:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


def quantity(value: float | None) -> str:
    """A count with its letter: 1.2M, 3.4T; a dash for nothing."""
    if not value:
        return "–"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def share(part: float | None, whole: float) -> str:
    return f"{part / whole:.0%}" if part and whole else "–"


def duration(seconds: float) -> str:
    """Seconds as 48 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
