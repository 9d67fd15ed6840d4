"""The tables of several runs, a column a run: results, what the configs differ in, data, time, environment, faults."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glmv_jax.eval import report_runs as runs_lib
from glmv_jax.eval.goodput import PARTS
from glmv_jax.eval.report_run import StageRun, is_number
from glmv_jax.eval.report_runs import MISSING
from glmv_jax.eval.report_tables import Cell, Table, duration, improved, is_detail, number, quantity, share

NONE = Cell("–", "quiet")
Runs = Sequence[StageRun]

# Of a training row -> what it is called, and how it is written.
RATES: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps_per_second": ("steps/s", number),
    "samples_per_second": ("samples/s", quantity),
    "tokens_per_second": ("tokens/s", quantity),
    "flops_per_second": ("FLOP/s", quantity),
    "flop_utilisation": ("of the devices' peak", lambda x: f"{x:.1%}"),
    "data_wait": ("waiting for data", lambda x: f"{x:.1%}"),
    "time/host": ("host between steps", lambda x: f"{x:.1%}"),
}


def _columns(runs: Runs) -> list[str]:
    return [run.name for run in runs]


# --- of runs of one stage ---------------------------------------------------------------------------------------------


def results_table(runs: Runs) -> Table | None:
    """Held-out numbers, the best of each marked; of two runs their difference. None where no run has any."""
    found = {run.name: _held_out(run) for run in runs}
    metrics = list(dict.fromkeys(name for numbers in found.values() for name in numbers if not is_detail(name)))
    if not metrics:
        return None
    chance = [run.results.get("metrics", {}) for run in runs]
    rows = []
    for metric in metrics:
        values = [found[run.name].get(metric, (None, "")) for run in runs]
        best = _best(metric, [value for value, _ in values])
        row = [Cell(number(x), "good" if x is not None and x == best else "", remark) if x is not None else NONE
               for x, remark in values]  # fmt: skip
        if len(runs) == 2:
            row.append(_difference(metric, *(value for value, _ in values)))
        guess = next((m[metric]["chance"] for m in chance if is_number(m.get(metric, {}).get("chance"))), None)
        rows.append([Cell(metric), *row, Cell(number(guess), "quiet")])
    more = ["difference"] if len(runs) == 2 else []
    note = "After training; of a run that has not finished, its last evaluation."
    return Table("Held-out results", ["held-out", *_columns(runs), *more, "chance"], rows, note)


def _held_out(run: StageRun) -> dict[str, tuple[float, str]]:
    """metric -> (value, remark): of results.json, or the last point of the curve."""
    done = {name: (x["trained"], f"from {number(x['untrained'])}" if is_number(x.get("untrained")) else "")
            for name, x in run.results.get("metrics", {}).items() if is_number(x.get("trained"))}  # fmt: skip
    if run.results:
        return done
    return {name: (points[-1][1], f"step {points[-1][0]:g}")
            for (name, kind), points in run.curves().items() if kind == "eval"}  # fmt: skip


def _best(metric: str, values: list[float | None]) -> float | None:
    """The best of the values, where there is one: they differ, and more (or less) is better."""
    known = [x for x in values if x is not None]
    if len(known) < 2 or min(known) == max(known) or (rises := improved(metric, 0.0, 1.0)) is None:
        return None
    return max(known) if rises else min(known)


def _difference(metric: str, first: float | None, second: float | None) -> Cell:
    if first is None or second is None:
        return NONE
    tone = {True: "good", False: "bad", None: ""}[improved(metric, first, second)] if first != second else "quiet"
    size = abs(second - first)
    return Cell(f"{'−' if second < first else '+'}{number(size) if size >= 0.01 or not size else f'{size:.2g}'}", tone)


def config_table(runs: Runs) -> Table | None:
    """Keys whose values differ, by their full names. None where there is one config or none to compare."""
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return None
    found = runs_lib.differences([run.config for run in known])
    rows = [[Cell(key, "head"), *(Cell("not set", "quiet") if x is MISSING else Cell(repr(x)) for x in values)]
            for key, values in found.items()]  # fmt: skip
    note = "" if rows else "The configs are the same, to the last value."
    without = [run.name for run in runs if not run.config]
    note += f" No config.json that can be read: {', '.join(without)}." if without else ""
    return Table("What the configs differ in", ["key", *_columns(known)], rows, note.strip(), "values")


def sources_table(runs: Runs) -> Table | None:
    """What was trained on, by source, and how it went there. None for runs that name no sources."""
    seen = [runs_lib.seen(run) for run in runs]
    plans = [runs_lib.planned(run) if not counted else {} for run, counted in zip(runs, seen)]
    told: list[Mapping[str, Any]] = [*seen, *plans]
    names = dict.fromkeys(name for table in told for name in table)
    if not names:
        return None
    totals = [sum(row.get("samples", 0.0) for row in counted.values()) for counted in seen]
    size = lambda name: max((counted.get(name, {}).get("samples", 0.0) for counted in seen), default=0.0)  # noqa: E731
    rows = []
    for name in sorted(names, key=lambda name: (-size(name), name)):
        cells = [_of_source(counted.get(name), total, plan.get(name), _last(run, name))
                 for run, counted, total, plan in zip(runs, seen, totals, plans)]  # fmt: skip
        rows.append([Cell(name), *cells])
    if any(totals):
        rows.append([Cell("all", "head"), *(Cell(quantity(total)) if total else NONE for total in totals)])
    note = "Samples, and their share of all." if any(totals) else ""
    note += " ≈: by the weights of the config, as what was read was not counted." if any(plans) else ""
    return Table("Data by source", ["source", *_columns(runs)], rows, note.strip())


def _of_source(row: dict[str, float] | None, total: float, plan: float | None, last: str) -> Cell:
    if row and total:
        return Cell(f"{quantity(row.get('samples'))} ({share(row.get('samples'), total)})", remark=last)
    return Cell(f"≈ {plan:.0%}", "quiet", last) if plan else NONE


def _last(run: StageRun, source: str) -> str:
    """The loss or reward of a source over the last tenth of the rows that have it."""
    for metric, called in (("reward", "reward"), ("ce", "loss")):
        points = run.curves().get((f"{metric}/{source}", "train"), [])
        if points:
            return f"{called} {number(statistics.fmean(y for _, y in points[-max(1, len(points) // 10) :]))}"
    return ""


# --- of any runs ------------------------------------------------------------------------------------------------------


def throughput_table(runs: Runs) -> Table:
    """What was done, and how fast: rates are medians over the rows of the log, evaluations and pauses left out."""
    facts: list[tuple[str, Callable[[StageRun], str]]] = [
        ("state", lambda run: run.status),
        ("last step", lambda run: f"{run.last_step:,}" if run.metrics else ""),
        ("wall time", lambda run: duration(run.seconds) if run.seconds else ""),
        ("samples", lambda run: quantity(run.results.get("samples"))),
        ("tokens", lambda run: quantity(run.results.get("tokens"))),
        ("FLOPs", lambda run: quantity(run.results.get("flops"))),
    ]
    rows = [[Cell(name), *(Cell(said(run)) if said(run) not in ("", "–") else NONE for run in runs)]
            for name, said in facts]  # fmt: skip
    for key, (name, written) in RATES.items():
        curves = [[y for _, y in run.curves().get((key, "train"), [])] for run in runs]
        if any(curves):
            rows.append([Cell(name), *(Cell(written(statistics.median(ys))) if ys else NONE for ys in curves)])
    memory = [run.results.get("step_memory") for run in runs]
    if any(memory):
        cells = (Cell(f"{x / 2**20:,.0f} MiB") if x else NONE for x in memory)
        rows.append([Cell("memory of a step, by the compiler"), *cells])
    return Table("Throughput", ["run", *_columns(runs)], rows, "Rates: the median over the rows of the log.")


def time_table(runs: Runs) -> Table | None:
    """Where the wall time went, by part, of all attempts."""
    found = [run.time for run in runs]
    spent = [sum(time.get("seconds", {}).values()) for time in found]
    if not any(spent):
        return None
    rows = [[Cell("goodput", "head"), *(Cell(share(time.get("goodput"), 1.0)) for time in found)]]
    for part, means in PARTS.items():
        mine = [time.get("seconds", {}).get(part, 0.0) for time in found]
        if any(mine):
            cells = (Cell(f"{_seconds(x)} ({share(x, total)})") if x else NONE for x, total in zip(mine, spent))
            rows.append([Cell(part, remark=means), *cells])
    rows.append([Cell("attempts"), *(Cell(str(time["attempts"])) if time.get("attempts") else NONE for time in found)])
    note = "Goodput: the share of the time in training steps and rollouts."
    return Table("Where the time went", ["part", *_columns(runs)], rows, note)


def _seconds(x: float) -> str:
    return duration(x) if x >= 10 else f"{x:.1f} s"


def environment_table(runs: Runs) -> Table | None:
    """What the runs were made with; what differs comes first, and is marked."""
    found = [runs_lib.environment(run) for run in runs]
    names = list(dict.fromkeys(name for facts in found for name in facts))
    differs = {name: len({facts.get(name) for facts in found}) > 1 for name in names}
    if not names:
        return None
    rows = []
    for name in sorted(names, key=lambda name: (not differs[name], name == "started")):
        cells = (Cell(facts[name]) if name in facts else NONE for facts in found)
        rows.append([Cell(name, "head" if differs[name] else ""), *cells])
    note = "" if len(runs) < 2 else "Bold: not the same in all."
    return Table("Environment", ["", *_columns(runs)], rows, note, "values")


def faults_table(runs: Runs) -> Table:
    """What went wrong, and how often: records, updates, spikes, signals, restarts."""
    found = [runs_lib.faults(run) for run in runs]
    names = sorted(dict.fromkeys(name for counts in found for name in counts))
    rows = [[Cell(name), *(Cell(f"{counts[name]:,}") if name in counts else NONE for counts in found)]
            for name in names]  # fmt: skip
    note = "" if rows else "Nothing is on record: no record left out, no update left out, no signal, no restart."
    return Table("Faults", ["what", *_columns(runs)], rows, note)


def spikes_table(runs: Runs, shown: int = 20) -> Table | None:
    """Steps whose loss stood far above those before it, the highest first, and what was in their batches."""
    found = [(run, row) for run in runs for row in run.rows("spike") if is_number(row.get("deviations"))]
    if not found:
        return None
    found.sort(key=lambda item: -item[1]["deviations"])
    rows = []
    for run, row in found[:shown]:
        metric = runs_lib.spiked(row)
        numbers = (number(row.get(metric)), number(row.get("median")), f"{row['deviations']:.1f}")
        rows.append([Cell(run.name), Cell(f"{row['step']:,}"), Cell(metric), *map(Cell, numbers), Cell(_batch(row))])
    note = "Deviations: how many robust standard deviations above the running median. Batch: its samples by source."
    note += f" {len(found) - shown} more are in metrics.jsonl." if len(found) > shown else ""
    return Table(
        "Loss spikes", ["run", "step", "metric", "value", "median", "deviations", "batch"], rows, note, "values"
    )


def _batch(row: dict[str, Any]) -> str:
    counts = {name.removeprefix("samples/"): x for name, x in row.items()
              if name.startswith("samples/") and is_number(x)}  # fmt: skip
    return ", ".join(f"{name} {x:g}" for name, x in sorted(counts.items(), key=lambda item: -item[1])) or "–"


# --- together ---------------------------------------------------------------------------------------------------------


def of_stage(runs: Runs) -> list[Table]:
    """What only runs of one stage can be compared by."""
    return [table for table in (results_table(runs), config_table(runs), sources_table(runs)) if table]


def of_all(runs: Runs) -> list[Table]:
    made = (throughput_table(runs), time_table(runs), faults_table(runs), spikes_table(runs), environment_table(runs))
    return [table for table in made if table]


def shown(runs: Runs) -> list[Table]:
    """What of it the terminal shows: all but the environment, which the page has."""
    groups = runs_lib.by_stage(runs)
    tables = []
    for stage, group in groups.items():
        for table in of_stage(group):
            title = f"{table.title}: {stage or 'no stage'}" if len(groups) > 1 else table.title
            tables.append(dataclasses.replace(table, title=title))
    more = (throughput_table(runs), time_table(runs), faults_table(runs), spikes_table(runs))
    return [*tables, *(table for table in more if table)]
