"""The report's section on rollouts: sources side by side, what was asked and answered, and what the pipeline did."""

from __future__ import annotations

import collections
from typing import Any

from glmv_jax.eval import report_html as page
from glmv_jax.eval import report_rollouts as rollouts
from glmv_jax.eval.report_html import text
from glmv_jax.eval.report_run import StageRun
from glmv_jax.eval.report_svg import COLOURS, Series, line_chart
from glmv_jax.eval.report_tables import duration, number

SHOWN = ("reward", "pass")  # the rest is folded away
ANSWERS = 4  # different ones of a group
PICTURES = 4  # of an answer
LONGEST = 240  # characters of an answer
BEGIN_BOX, END_BOX = "<|begin_of_box|>", "<|end_of_box|>"
WIDE, LANE, LEFT = 720, 22, 70  # of the pipeline's figure


def section(run: StageRun, found: rollouts.Curves) -> str:
    """Everything about the rollouts of a stage; "" for one without."""
    content = rollouts.table(found)
    parts = [page.table(content, level=3) if content else "", _curves(found), _groups(run), _pipeline(run)]
    return "".join(parts)


def _curves(found: rollouts.Curves) -> str:
    shown: list[str] = []
    folded: list[str] = []
    for metric, by in found.items():
        if max(map(len, by.values())) < 2 or (metric not in SHOWN and not any(v for p in by.values() for _, v in p)):
            continue  # nothing to draw, or nothing but zeros
        charts = (_chart(rollouts.label(metric), by, sources) for sources in _some(list(by)))
        (shown if metric in SHOWN else folded).extend(charts)
    grid = lambda charts: f"<div class=grid>{''.join(charts)}</div>"  # noqa: E731
    rest = f"<details><summary>length, truncation and more by source</summary>{grid(folded)}</details>"
    return (grid(shown) if shown else "") + (rest if folded else "")


def _some(sources: list[str]) -> list[list[str]]:
    """As many as there are colours, and as even as can be."""
    charts = -(-len(sources) // COLOURS)
    return [sources[i * len(sources) // charts : (i + 1) * len(sources) // charts] for i in range(charts)]


def _chart(title: str, by: dict[str, list], sources: list[str]) -> str:
    series = [Series(source, by[source], "train", i) for i, source in enumerate(sources)]
    last = [number(rollouts.ends(by[source])[1]) for source in sources]
    legend = (f'<span><i style="background:var(--c{i})"></i>{text(source)} <small>{value}</small></span>'
              for i, (source, value) in enumerate(zip(sources, last)))  # fmt: skip
    return f"<figure><h4>{text(title)}</h4>{line_chart(series)}<figcaption>{' '.join(legend)}</figcaption></figure>"


# --- answers ----------------------------------------------------------------------------------------------------------


def _groups(run: StageRun) -> str:
    by = rollouts.groups(run.folder)
    if not by:
        return ""
    cards = "".join(_card(run, group) for groups in by.values() for group in groups)
    legend = ""
    if any(rollouts.marks(group) for groups in by.values() for group in groups):
        legend = " Dashed: the gold box or point. Solid: the best answer's."
    note = "Of each source an early group and a late one: what was asked, and the answers with what each earned."
    return f"<h3>Rollouts</h3><p class=quiet>{note}{legend}</p><div class=cards>{cards}</div>"


def _card(run: StageRun, group: rollouts.Group) -> str:
    prompt, best = group.prompt, group.answers[0]
    files = [f"{name}.png" for name in best.get("images", ())]
    drawn = rollouts.marks(group)
    pictures = "".join(page.picture(run.folder / "pictures", file, drawn if i == 0 else ())
                       for i, file in enumerate(files[:PICTURES]))  # fmt: skip
    if len(files) > PICTURES:
        pictures += f"<small class=quiet>and {len(files) - PICTURES} more pictures</small>"
    gold = f"<p class=quiet>gold: {text(prompt['gold'])}</p>" if prompt.get("gold") else ""
    return (
        f"<article>{pictures}<small class=quiet>{text(prompt.get('source', ''))}, step {text(prompt.get('step', ''))}"
        f"</small><p class=prompt>{text(prompt.get('prompt', ''))}</p>{gold}<ul class=answers>{_answers(group)}</ul>"
        "</article>"
    )


def _answers(group: rollouts.Group) -> str:
    """The different answers, best first, the worst among them, each with its reward and how often it was given."""
    times: collections.Counter = collections.Counter()
    for row in group.answers:
        times[row["reward"], row.get("text", ""), ", ".join(row.get("flags", ()))] += 1
    every = list(times.items())
    kept = every if len(every) <= ANSWERS else [*every[: ANSWERS - 1], every[-1]]
    lines = []
    for (reward, said, flags), count in kept:
        tone = "good" if reward >= 0.5 else "bad"
        often = f" <small class=quiet>× {count}</small>" if count > 1 else ""
        why = f" <small class=quiet>{text(flags)}</small>" if flags else ""
        shown = text(_short(said)) or "<span class=quiet>(nothing)</span>"
        lines.append(f"<li><b class={tone}>{reward:.2f}</b> {shown}{often}{why}</li>")
    if len(every) > len(kept):
        lines.insert(-1, f"<li class=quiet>… {len(every) - len(kept)} more</li>")
    return "".join(lines)


def _short(said: str) -> str:
    """Box tokens as brackets; the middle of a long answer left out."""
    said = said.replace(BEGIN_BOX, "⟦").replace(END_BOX, "⟧")
    return said if len(said) <= LONGEST else f"{said[: LONGEST // 2]} … {said[-LONGEST // 2 :]}"


# --- the pipeline -----------------------------------------------------------------------------------------------------


def _pipeline(run: StageRun) -> str:
    found = rollouts.pipeline(run.folder)
    if found is None:
        return ""
    stages = [name.removesuffix("_seconds") for name in found.numbers if name.endswith("_seconds")]
    worked = ", ".join(f"{stage} {duration(found.numbers[f'{stage}_seconds'])}" for stage in stages)
    facts = (
        f"Two parts or more worked at once in {found.numbers.get('overlap', 0.0):.0%} of the time. {worked}."
    )
    note = "The last steps that were traced; trace.json opens in Perfetto."
    return (f"<h3>The pipeline</h3><p>{text(facts)}</p><figure>{_lanes(found, stages)}</figure>"
            f"<p class=quiet>{note}</p>")  # fmt: skip


def _lanes(found: rollouts.Pipeline, stages: list[str]) -> str:
    """A lane a stage, a bar wherever it worked; a line where a step of training begins."""
    x_of = lambda seconds: LEFT + (WIDE - LEFT - 8) * seconds / (found.seconds or 1.0)  # noqa: E731
    high = LANE * len(stages)
    parts: list[Any] = []
    for name, begin in found.steps:
        parts.append(f'<path class="grid" d="M{x_of(begin):.1f} 0V{high}"/>')
        parts.append(f'<text x="{x_of(begin):.1f}" y="{high + 13}" text-anchor="start">{text(name)}</text>')
    for i, stage in enumerate(stages):
        parts.append(f'<text x="{LEFT - 8}" y="{LANE * i + 15}" text-anchor="end">{text(stage)}</text>')
        for begin, end in found.busy.get(stage, []):
            wide = max(0.8, x_of(end) - x_of(begin))
            parts.append(
                f'<rect fill="var(--c{i % COLOURS})" x="{x_of(begin):.1f}" y="{LANE * i + 4}" width="{wide:.1f}" '
                f'height="{LANE - 8}"><title>{text(stage)}, {end - begin:.3g} s</title></rect>'
            )
    return f'<svg class="chart" viewBox="0 0 {WIDE} {high + 20}" role="img">{"".join(parts)}</svg>'
