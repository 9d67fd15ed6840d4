"""The page of a sweep: curves with their band over seeds, differences of curves, dots a seed, and the tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from glmv_jax.eval import report_html as page
from glmv_jax.eval import report_sweep as sweeps
from glmv_jax.eval import report_sweep_tables as sweep_tables
from glmv_jax.eval.report_run import Point
from glmv_jax.eval.report_svg import Series, dot_chart, line_chart, running_mean
from glmv_jax.eval.report_sweep import Arm, Sweep
from glmv_jax.eval.report_tables import duration, number
from glmv_jax.eval.statistics import spread, t_quantile

LONG = 12  # characters of an arm's label that still fit under a column of dots
_BAND = (
    "Line: mean over seeds of each run's running mean (over about a twentieth of the run). Band: one standard "
    "deviation of the seeds either way."
)
_DIFFERENCE = "Difference: runs of the same seed subtracted step by step; band: 95 % interval of its mean over seeds."

Rows = list[tuple[float, list[float]]]  # (step, a value a seed)


def body(sweep: Sweep) -> str:
    """Everything between <body> and the footer."""
    arms = sweep.arms
    done = sum(member.finished for member in sweep.members)
    seconds = sum(member.record.get("seconds", 0.0) for member in sweep.members)
    meta = next((member.stage.meta for member in sweep.members if member.stage.meta), {})
    facts = [
        str(sweep.file.get("config", "")), f"{len(arms)} arms, {done} of {len(sweep.members)} runs finished",
        duration(seconds), f"jax {meta['jax']}" if meta.get("jax") else "",
        f"{meta['host']['cores']} cores" if meta.get("host") else "",
    ]  # fmt: skip
    curves = _curves(sweep)
    return "".join([
        f"<h1>{page.text(sweep.root.resolve().name)}</h1>",
        f"<p class=quiet>{page.text(' · '.join(fact for fact in facts if fact))}</p>",
        f"<h2>Curves</h2><p class=quiet>{_BAND} {_DIFFERENCE if len(arms) > 1 else ''}</p>{curves}" if curves else "",
        _dots(sweep),
        "".join(page.table(content) for content in sweep_tables.tables(sweep)),
        _config(sweep),
    ])  # fmt: skip


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves(sweep: Sweep) -> str:
    """The main training curves with a closer look and their differences; held-out courses; the rest folded."""
    names = _names(sweep, "train")
    shown = "".join(_three(sweep, name) for name in names if sweeps.is_main(name))
    courses = [_figure(f"{name}, held-out", sweep.arms, _rows(sweep, name, "eval"), smooth=False)
               for name in _names(sweep, "eval")]  # fmt: skip
    details = [_figure(f"{name}, train", sweep.arms, _rows(sweep, name, "train"))
               for name in names if not sweeps.is_main(name) and not sweeps.is_rate(name)]  # fmt: skip
    held_out = f"<h3>Held-out</h3>{_grid(courses)}" if any(courses) else ""
    rest = f"<details><summary>more curves</summary>{_grid(details)}</details>" if any(details) else ""
    return shown + held_out + rest


def _grid(figures: list[str]) -> str:
    return f"<div class=grid>{''.join(figures)}</div>"


def _names(sweep: Sweep, kind: str) -> list[str]:
    """Metrics with a course to show in some run."""
    found = [(name, len(points)) for m in sweep.members for (name, k), points in m.curves.items() if k == kind]
    return list(dict.fromkeys(name for name, count in found if count > 2))


def _rows(sweep: Sweep, name: str, kind: str) -> Callable[[Arm], dict[int, list[Point]]]:
    """Seed -> curve of an arm: of its finished runs, or while there is none of those that are under way."""

    def curves(arm: Arm) -> dict[int, list[Point]]:
        found = {m.seed: m.curves.get((name, kind), []) for m in arm.finished or arm.members}
        return {seed: points for seed, points in found.items() if len(points) > 2}

    return curves


def _three(sweep: Sweep, name: str) -> str:
    rows = _rows(sweep, name, "train")
    figures = [_figure(f"{name}, train{part}", sweep.arms, rows, since=since)
               for part, since in (("", 0.0), (", second half", 0.5))]  # fmt: skip
    drawn = [arm for arm in sweep.arms if rows(arm)]
    if len(drawn) > 1:
        figures.append(_difference(name, sweep.arms, drawn[0], drawn[1:], rows))
    return f"<h3>{page.text(name)}</h3>{_grid(figures)}"


def _figure(
    title: str, arms: list[Arm], rows: Callable[[Arm], dict[int, list[Point]]], *, since: float = 0.0,
    smooth: bool = True,
) -> str:  # fmt: skip
    series, legend = [], []
    for colour, arm in enumerate(arms):
        curves = rows(arm)
        table = sweeps.common(_smooth(points) if smooth else points for points in curves.values())
        if table := _since(table, since):
            deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in table]
            series.append(_series(arm.label, table, colour, deviations))
            legend.append(_entry(arm.label, colour, number(series[-1].points[-1][1]), len(curves)))
    return _drawn(title, series, legend)


def _difference(
    name: str, arms: list[Arm], reference: Arm, others: list[Arm], rows: Callable[[Arm], dict[int, list[Point]]]
) -> str:
    series, legend = [], []
    first = {seed: dict(_smooth(points)) for seed, points in rows(reference).items()}
    for arm in others:
        curves = {seed: dict(_smooth(points)) for seed, points in rows(arm).items() if seed in first}
        differences = [sorted((x, y - first[seed][x]) for x, y in curve.items() if x in first[seed])
                       for seed, curve in curves.items()]  # fmt: skip
        # The first tenth is the steep one: differences there are of when, not of where the arms arrive.
        if table := _since(sweeps.common(differences), 0.1):
            found = [spread(values) for _, values in table]
            halves = [one.high - one.mean if one.high is not None else 0.0 for one in found]
            colour = arms.index(arm)
            series.append(_series(f"{arm.label} − {reference.label}", table, colour, halves))
            legend.append(_entry(series[-1].name, colour, f"{series[-1].points[-1][1]:+.4f}", len(differences)))
    return _drawn(f"{name}, difference to {reference.label}", series, legend)


def _smooth(points: list[Point]) -> list[Point]:
    """The running mean without its last points, whose windows are shorter: they would end the curve in noise."""
    return running_mean(points)[: len(points) - len(points) // 40]


def _since(table: Rows, share: float) -> Rows:
    """The rows from this share of the steps on."""
    return [row for row in table if row[0] >= table[0][0] + share * (table[-1][0] - table[0][0])]


def _series(name: str, table: Rows, colour: int, halves: list[float]) -> Series:
    means = [(step, statistics.fmean(values)) for step, values in table]
    band = [(step, mean - half, mean + half) for (step, mean), half in zip(means, halves)] if any(halves) else []
    return Series(name, means, "mean", colour, band)


def _entry(label: str, colour: int, value: str, seeds: int) -> str:
    swatch = f'<i style="background:var(--c{colour % 6})"></i>'
    return f"<span>{swatch}{page.text(label)} <small>{value}, {seeds} seed{'s' * (seeds != 1)}</small></span>"


def _drawn(title: str, series: list[Series], legend: list[str]) -> str:
    if not series:
        return ""
    return (
        f"<figure><figcaption><b>{page.text(title)}</b></figcaption>{line_chart(series)}"
        f"<figcaption>{' '.join(legend)}</figcaption></figure>"
    )


# --- the rest ---------------------------------------------------------------------------------------------------------


def _dots(sweep: Sweep) -> str:
    """Final values: a dot a seed, a bar at their mean, a line over its interval."""
    figures = []
    arms = [arm for arm in sweep.arms if arm.finished]
    short = {arm.label: arm.label for arm in arms}
    if any(len(label) > LONG for label in short) or len(arms) > 5:
        short = {arm.label: str(i) for i, arm in enumerate(arms, 1)}
    for name in sweeps.metrics(sweep)[: sweep_tables.SHOWN]:
        values = {short[arm.label]: list(arm.by_seed(name).values()) for arm in arms}
        values = {label: column for label, column in values.items() if column}
        found = {label: spread(column) for label, column in values.items()}
        intervals = {label: (s.low, s.high) for label, s in found.items() if s.low is not None}
        chart = dot_chart("", values, intervals=intervals)
        figures.append(f"<figure><figcaption><b>{page.text(name)}</b></figcaption>{chart}</figure>")
    if not figures:
        return ""
    key = " ".join(f"<span>{i}: {page.text(label)}</span>" for label, i in short.items() if label != i)
    key = f"<p class=quiet>{key}</p>" if key else ""
    text = "A dot a seed, a bar at their mean, a line over its 95 % interval"
    few = max(len(arm.finished) for arm in arms)
    if 1 < few <= 3:
        text += f" (with {few} seeds {t_quantile(0.975, few - 1):.1f} standard errors either way)"
    return f"<h2>Seed by seed</h2><p class=quiet>{text}.</p>{key}{_grid(figures)}"


def _config(sweep: Sweep) -> str:
    lines = "\n".join(f"{key} = {value!r}" for key, value in sweep.file.get("base", {}).items())
    shared = f"<details><summary>what all runs share</summary><pre>{page.text(lines)}</pre></details>"
    problems = [f"{m.record['name']}: {problem}" for m in sweep.members for problem in m.stage.problems]
    return "".join(f"<p class=bad>{page.text(problem)}</p>" for problem in problems) + shared
