"""The page of one run or of several: curves laid over each other, a colour a run, then the tables and the answers.

A tick in the legend takes a run out of every chart; that is CSS, as the page has no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from glmv_jax.eval import report_html as page
from glmv_jax.eval import report_rollouts, report_rollouts_html
from glmv_jax.eval import report_runs as runs_lib
from glmv_jax.eval import report_runs_tables as tables
from glmv_jax.eval.report_html import text
from glmv_jax.eval.report_run import STAGES, Point, StageRun, is_number
from glmv_jax.eval.report_runs_tables import Runs
from glmv_jax.eval.report_svg import COLOURS, Series, line_chart, running_mean
from glmv_jax.eval.report_tables import Table, duration, number, quantity

CROWD = 2  # runs up to which each step of a training curve is drawn, palely, behind its running mean
BY_SOURCE = ("ce", "reward", "accuracy", "pass", "length")  # metrics whose curve of each source is drawn
ANSWERS = 24  # held-out questions that several runs answered
MAIN = ("loss", "reward/mean", "accuracy", "accuracy/mean", "ce", "mtp", "grad_norm")


def body(runs: Runs) -> str:
    """Everything between <body> and the footer."""
    groups = runs_lib.by_stage(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    if len(runs) <= 3:
        title = " · ".join(run.name for run in runs)
    links = [(f"stage-{i}", stage or "no stage") for i, stage in enumerate(groups)] if len(groups) > 1 else []
    links += [("throughput", "throughput"), ("faults", "faults"), ("environment", "environment"), ("runs", "each run")]
    nav = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name in links)
    return "".join([
        f"<h1>{text(title)}</h1>{_summary(runs, groups)}{_legend(runs)}<nav>{nav}</nav>",
        *(_stage(f"stage-{i}", stage, group, runs, len(groups)) for i, (stage, group) in enumerate(groups.items())),
        f"<section>{''.join(_anchored(content) for content in tables.of_all(runs))}</section>",
        f'<section id="runs"><h2>Each run</h2>{"".join(map(_details, runs))}</section>',
    ])  # fmt: skip


def _anchored(content: Table) -> str:
    return f'<div id="{text(content.title.split()[0].lower())}">{page.table(content)}</div>'


def _summary(runs: Runs, groups: dict[str, list[StageRun]]) -> str:
    done = sum(bool(run.results) for run in runs)
    facts = [f"{done} of {len(runs)} finished" if len(runs) > 1 else runs[0].status,
             duration(sum(run.seconds for run in runs)), ", ".join(stage for stage in groups if stage)]  # fmt: skip
    lines = [f"<p class=quiet>{text(' · '.join(fact for fact in facts if fact))}</p>"]
    if len(groups) > 1:
        said = ", ".join(stage or "none named" for stage in groups)
        lines.append(f"<p>These runs are of different stages ({text(said)}): each stage has curves, results and "
                     "differences of its own.</p>")  # fmt: skip
    lines += [f"<p class=bad>{text(run.name)}: no metrics yet ({text(run.folder)}/metrics.jsonl has no row)</p>"
              for run in runs if not run.metrics]  # fmt: skip
    lines += [f"<p class=bad>{text(run.name)}: {text(problem)}</p>" for run in runs for problem in run.problems]
    return "".join(lines)


def _legend(runs: Runs) -> str:
    """A colour a run; with several, each can be taken out of the charts."""
    if len(runs) == 1:
        return f"<p class=quiet>{text(runs[0].folder)}</p>"
    hide = "".join(f"body:has(#r{i}:not(:checked)) .r{i}{{display:none}}" for i in range(len(runs)))
    entries = "".join(
        f'<label><input type="checkbox" id="r{i}" checked/>{_swatch(i)}<b>{text(run.name)}</b> '
        f"<small>{text(run.status)}</small></label>"
        for i, run in enumerate(runs)
    )
    return f"<style>{hide}</style><div class=legend>{entries}</div>"


def _swatch(i: int) -> str:
    return f'<i class="dash{i // COLOURS}" style="background:var(--c{i % COLOURS})"></i>'


# --- a stage ----------------------------------------------------------------------------------------------------------


def _stage(anchor: str, stage: str, group: Runs, runs: Runs, groups: int) -> str:
    head = ""
    if groups > 1:
        alone = ". One run: nothing to compare it with." if len(group) == 1 else ""
        head = f"<h2>{text(stage or 'no stage')}</h2><p class=quiet>{text(STAGES.get(stage, ''))}{alone}</p>"
    colours = [runs.index(run) for run in group]
    content = "".join(page.table(one, level=3 if groups > 1 else 2) for one in tables.of_stage(group))
    return f'<section id="{anchor}">{head}{_curves(group, colours)}{content}{_answers(group, colours)}</section>'


def _curves(group: Runs, colours: list[int]) -> str:
    """Losses, rewards and held-out courses in sight; what is told by source and all else folded."""
    found: dict[tuple[str, str], dict[int, list[Point]]] = {}
    for run, i in zip(group, colours):
        for key, points in run.curves().items():
            found.setdefault(key, {})[i] = points
    names, sources = {i: run.name for run, i in zip(group, colours)}, _sources(group)
    places: dict[str, list[str]] = {"shown": [], "by source": [], "more curves": []}
    for (name, kind), curves in sorted(found.items(), key=lambda item: _order(*item[0])):
        place = _place(name, kind, sources)
        if place and max(map(len, curves.values())) > 2 and _moves(curves.values()):
            marks = {i: _spikes(run, name) for run, i in zip(group, colours)} if kind == "train" else {}
            places[place].append(_chart(name, kind, curves, names, marks))
    shown = places.pop("shown")
    rest = "".join(f"<details><summary>{title}</summary>{_grid(charts)}</details>"
                   for title, charts in places.items() if charts)  # fmt: skip
    return (_grid(shown) if shown else "<p class=quiet>No curve has a course to show yet.</p>") + rest


def _sources(group: Runs) -> set[str]:
    found = {source for run in group for source in (*runs_lib.seen(run), *runs_lib.planned(run))}
    return found | {source for run in group for by in report_rollouts.curves(run).values() for source in by}


def _place(name: str, kind: str, sources: set[str]) -> str:
    """Where a curve is shown; "": nowhere, as of 30 sources there would be hundreds."""
    metric, _, of = name.partition("/")
    if kind == "eval":
        course = not metric.startswith("accuracy") or of in ("", "mean")
        return "shown" if course else "by source"
    if of and (metric == "seen" or of in sources or metric.startswith("mismatch")):
        return "by source" if metric.partition("@")[0] in BY_SOURCE else ""
    return "shown" if name in MAIN or name.endswith("/loss") else "more curves"


def _grid(charts: list[str]) -> str:
    return f"<div class=grid>{''.join(charts)}</div>"


def _moves(curves: Iterable[list[Point]]) -> bool:
    """Whether there is anything but one level."""
    values = [y for points in curves for _, y in points]
    return min(values) < max(values)


def _order(name: str, kind: str) -> tuple:
    return (name != "loss", not name.endswith("/mean"), kind != "train", name)


def _spikes(run: StageRun, metric: str) -> list[Point]:
    return [(row["step"], row[metric]) for row in run.rows("spike") if is_number(row.get(metric))]


def _chart(
    name: str, kind: str, curves: dict[int, list[Point]], names: dict[int, str], marks: dict[int, list[Point]]
) -> str:
    """marks: points of each run that are ringed."""
    series, legend = [], []
    for i, points in curves.items():
        crowded = kind == "train" and len(curves) > CROWD and len(points) > 8
        drawn, how = (running_mean(points), "mean") if crowded else (points, kind)
        series.append(Series(names[i], drawn, how, i, group=f"r{i}"))
        if marks.get(i):
            series.append(Series(f"{names[i]}, spike", marks[i], "marks", i, group=f"r{i}"))
        # A step of training is noise: the mean over the last twentieth of them.
        last = points[-1:] if kind == "eval" else points[-max(1, len(points) // 20) :]
        value = number(math.fsum(y for _, y in last) / len(last))
        legend.append(f'<span class="r{i}">{_swatch(i)}{text(names[i])} <small>{value}</small></span>')
    title = f"{name}, {'held-out' if kind == 'eval' else 'train'}"
    return (f"<figure><figcaption><b>{text(title)}</b></figcaption>{line_chart(series)}"
            f"<figcaption>{' '.join(legend)}</figcaption></figure>")  # fmt: skip


# --- answers ----------------------------------------------------------------------------------------------------------


def _answers(group: Runs, colours: list[int]) -> str:
    """What several runs answered to the same held-out question, beside each other."""
    found: dict[tuple[str, str], list[tuple[StageRun, int, dict[str, Any]]]] = {}
    for run, i in zip(group, colours):
        for row in run.samples:
            if "answer" in row and row.get("id") is not None:
                found.setdefault((str(row.get("source", "")), str(row["id"])), []).append((run, i, row))
    common: list[dict[str, Any]] = [{"source": source, "rows": rows} for (source, _), rows in found.items()
                                    if len(rows) > 1]  # fmt: skip
    if not common:
        return ""
    common.sort(key=lambda one: len({str(row.get("answer")) for _, _, row in one["rows"]}) == 1)  # where they differ
    cards = "".join(_question(one["rows"]) for one in page.spread(common, ANSWERS))
    note = "The same questions, answered by each run. Dashed: the gold box or point; in a run's colour: its own."
    return f"<h3>Answers side by side</h3><p class=quiet>{note}</p><div class=cards>{cards}</div>"


def _question(rows: list[tuple[StageRun, int, dict[str, Any]]]) -> str:
    run, _, first = rows[0]
    boxes = [box for box in first.get("boxes") or () if isinstance(box, dict) and box.get("role") == "gold"]
    boxes += [box | {"colour": i % COLOURS} for _, i, row in rows for box in row.get("boxes") or ()
              if isinstance(box, dict) and box.get("role") != "gold"]  # fmt: skip
    shown = page.picture(run.folder / "samples", first["image"], boxes) if first.get("image") else ""
    gold = f"<p class=quiet>gold: {text(first['gold'])}</p>" if first.get("gold") not in (None, "") else ""
    answers = "".join(f'<li class="r{i}">{_swatch(i)}{text(row["answer"]) or "<span class=quiet>(nothing)</span>"} '
                      f"{page.verdict(row)}</li>" for _, i, row in rows)  # fmt: skip
    source = text(first.get("source", ""))
    return (f"<article>{shown}<small class=quiet>{source}</small><p class=prompt>{text(first.get('prompt', ''))}</p>"
            f"{gold}<ul class=answers>{answers}</ul></article>")  # fmt: skip


# --- each run ---------------------------------------------------------------------------------------------------------


def _details(run: StageRun) -> str:
    facts = [run.stage, run.status, duration(run.seconds), f"{quantity(run.meta.get('params'))} parameters"]
    config = "\n".join(f"{key} = {value!r}" for key, value in run.config.items())
    folded = f"<details><summary>config</summary><pre>{text(config)}</pre></details>" if config else ""
    own = report_rollouts_html.section(run, report_rollouts.curves(run)) + page.samples(run)
    own = f"<details><summary>samples and rollouts</summary>{own}</details>" if own else ""
    return (f"<h3>{text(run.name)}</h3><p class=quiet>{text(run.folder)}</p>"
            f"<p>{text(' · '.join(fact for fact in facts if fact))}</p>{own}{folded}")  # fmt: skip
