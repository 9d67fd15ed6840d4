"""The report's page: pieces of HTML, each a function from the run to text. Everything shown is escaped here."""

from __future__ import annotations

import base64
import html
import io
import math
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, TypeGuard

from PIL import Image

from glmv_jax.data import coordinates
from glmv_jax.eval.report_run import StageRun, is_number
from glmv_jax.eval.report_svg import Series, line_chart
from glmv_jax.eval.report_tables import Cell, Table, number

SAMPLES_A_STAGE = 36
RETRIEVALS_A_LANGUAGE = 8
MAX_SIDE = 512  # larger pictures are made smaller for the page
ANSWERING, ANSWERS = ("rl", "sft", "pretrain"), 8  # whose answers the page begins with, and how many
TOGETHER = 4  # curves of one group share a chart up to this many
_LANGUAGES = {"en": "English", "zh": "中文"}


def text(value: Any) -> str:
    """Anything as escaped text; control characters and lone surrogates of a half-trained model become visible signs."""
    plain = "".join(c if c.isprintable() or c == "\n" else "�" for c in str(value))
    return html.escape(plain.encode("utf-8", "replace").decode("utf-8"))


def table(content: Table, level: int = 2) -> str:
    head = "".join(f"<th>{text(name)}</th>" for name in content.header)
    rows = []
    for row in content.rows:
        cells = "".join(f'<td class="{cell.tone}">{_cell(cell)}</td>' for cell in row)
        rows.append(f'<tr class="{"group" if row[0].tone == "head" else ""}">{cells}</tr>')
    note = f"<p class=quiet>{text(content.note)}</p>" if content.note else ""
    if not rows:
        return f"<h{level}>{text(content.title)}</h{level}>{note}"
    kind = f' class="{content.kind}"' if content.kind else ""
    return (
        f"<h{level}>{text(content.title)}</h{level}><div class=scroll><table{kind}><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _cell(cell: Cell) -> str:
    remark = f" <small class=quiet>{text(cell.remark)}</small>" if cell.remark else ""
    return text(cell.text).replace("/", "/<wbr>") + remark


def folded(summary: str, content: Table) -> str:
    return f"<details><summary>{text(summary)}</summary>{table(content)}</details>"


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(run: StageRun, elsewhere: Collection[str] = ()) -> str:
    """The curves of a stage: losses, rewards, accuracies and evaluations in sight, the rest folded away.

    elsewhere: sources whose training curves are shown apart.
    """
    table = {}
    for (name, kind), points in run.curves().items():  # a held-out number belongs beside the training's of that name
        if kind == "train" and (name.startswith("seen/") or name.endswith(tuple(f"/{one}" for one in elsewhere))):
            continue
        plain = name.removeprefix("heldout/").removeprefix("heldout ") if kind == "eval" else name
        table[plain, kind] = points
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for name, _ in table):
        groups.setdefault(name.partition("/")[0], []).append(name)
    shown: list[str] = []
    folded: list[str] = []
    for names in sorted(groups.values(), key=lambda names: (names != ["loss"], "loss" not in names[0])):
        for batch in [names] if len(names) <= TOGETHER else [[name] for name in names]:
            (shown if _is_main(batch, table) else folded).append(_chart(batch, table))
    rest = f"<details><summary>more curves</summary><div class=grid>{''.join(folded)}</div></details>"
    return f"<div class=grid>{''.join(shown)}</div>{rest if folded else ''}"


def _is_main(names: list[str], table: dict) -> bool:
    """Whether a chart is worth its place: it has a course to show, and of something that was the aim."""
    kinds = {kind: max(len(table.get((name, kind), ())) for name in names) for kind in ("train", "eval")}
    aim = kinds["eval"] > 2 or any(word in names[0] for word in ("loss", "reward", "accuracy"))
    return aim and max(kinds.values()) > 2


def _chart(names: list[str], table: dict) -> str:
    keys = [(name, kind) for name in names for kind in ("train", "eval") if (name, kind) in table]
    series, legend = [], []
    for i, (name, kind) in enumerate(keys):
        colour = i if len(names) == 1 else names.index(name)  # a lone metric's two curves differ in colour
        held_out = "held-out" if kind == "eval" else "train"
        series.append(Series(f"{name}, {held_out}", table[name, kind], kind, colour))
        value = number(table[name, kind][-1][1])
        swatch = f'<i style="background:var(--c{colour})"></i>'
        legend.append(f"<span>{swatch}{text(name)} <small>{held_out}: {value}</small></span>")
    return f"<figure>{line_chart(series)}<figcaption>{' '.join(legend)}</figcaption></figure>"


# --- pictures ---------------------------------------------------------------------------------------------------------


def samples(run: StageRun) -> str:
    """What the model answered: pictures with drawn boxes and points, and ranked pictures for retrieval queries."""
    answers = [row for row in run.samples if row.get("kind") != "retrieval"]
    ranked = [row for row in run.samples if row.get("kind") == "retrieval"]
    parts = []
    if answers:
        cards = "".join(_card(run, row) for row in spread(answers, SAMPLES_A_STAGE))
        parts.append(f"<h3>Held-out samples</h3>{_legend(answers)}<div class=cards>{cards}</div>")
    for language in dict.fromkeys(row.get("lang", "") for row in ranked):
        rows = [row for row in ranked if row.get("lang", "") == language][:RETRIEVALS_A_LANGUAGE]
        heading = text(_LANGUAGES.get(language, language))
        ranks = "".join(_retrieval(run, row) for row in rows)
        parts.append(f"<h3>Retrieval, {heading}</h3><div class=retrievals>{ranks}</div>")
    return "".join(parts)


def answers(stages: dict[str, StageRun]) -> str:
    """A few answers of the last stage of the recipe that has given some, of a source each; "" without one."""
    for run in (stages[name] for name in ANSWERING if name in stages):
        rows = {str(row.get("source")): row for row in reversed(run.samples) if row.get("image") and "answer" in row}
        if rows:
            first = list(rows.values())[::-1][:ANSWERS]
            cards = "".join(_card(run, row) for row in first)
            return f"<h2>What it answers after {text(run.name)}</h2>{_legend(first)}<div class=cards>{cards}</div>"
    return ""


def _legend(rows: list[dict[str, Any]]) -> str:
    drawn = any(row.get("boxes") for row in rows)
    return "<p class=quiet>Dashed: the gold box or point. Solid: the model's.</p>" if drawn else ""


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, taken in turn from every source, so that no task crowds out another."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_source.setdefault(str(row.get("source", "")), []).append(row)
    a_source = math.ceil(count / max(1, len(by_source)))
    return [row for group in by_source.values() for row in group[:a_source]][:count]


def _card(run: StageRun, row: dict[str, Any]) -> str:
    shown = picture(run.folder / "samples", row["image"], row.get("boxes") or ()) if row.get("image") else ""
    lines = [
        f"<small class=quiet>{text(row.get('source', ''))}</small> {verdict(row)}",
        f"<p class=prompt>{text(row['prompt'])}</p>" if row.get("prompt") else "",
        f"<p class=answer>{text(row['answer']) or '<span class=quiet>(nothing)</span>'}</p>" if "answer" in row else "",
        f"<p class=quiet>gold: {text(row['gold'])}</p>" if row.get("gold") not in (None, "", row.get("answer")) else "",
    ]
    return f"<article>{shown}{''.join(lines)}</article>"


def verdict(row: dict[str, Any]) -> str:
    """Right or wrong, or what was earned, where a row says it."""
    if row.get("correct") is not None:
        return "<small class=good>✓ right</small>" if row["correct"] else "<small class=bad>✗ wrong</small>"
    if is_number(row.get("reward")):
        return f"<small class={'good' if row['reward'] >= 0.5 else 'bad'}>reward {row['reward']:.2f}</small>"
    return ""


def _retrieval(run: StageRun, row: dict[str, Any]) -> str:
    gold = row.get("gold")
    files = row.get("images", [])
    hit = isinstance(gold, int) and 0 <= gold < len(files)
    pictures = "".join(
        f'<span class="{"hit" if i == gold else ""}">{picture(run.folder / "samples", file, ())}</span>'
        for i, file in enumerate(files)
    )
    place = f"found at place {int(gold) + 1}" if gold is not None and hit else f"not among the first {len(files)}"
    tone = "good" if hit and gold == 0 else "quiet" if hit else "bad"
    return (
        f"<div class=retrieval><p>{text(row.get('query', ''))}<br><small class={tone}>{place}</small></p>"
        f"<div>{pictures}</div></div>"
    )


def picture(folder: pathlib.Path, name: str, boxes: Any) -> str:
    """The picture as an SVG of its own pixels, with boxes and points drawn over it; a missing picture is named."""
    try:
        data, width, height = _png(folder / str(name))
    except (OSError, ValueError) as error:
        return f'<p class="nopicture quiet">{text(name)} cannot be shown ({text(type(error).__name__)})</p>'
    marks = "".join(_mark(item, width, height) for item in boxes if isinstance(item, dict))
    return (
        f'<svg class=picture viewBox="0 0 {width} {height}" role="img">'
        f'<image href="data:image/png;base64,{data}" width="{width}" height="{height}"/>{marks}</svg>'
    )


def _png(path: pathlib.Path) -> tuple[str, int, int]:
    with Image.open(path) as image:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", optimize=True)
        return base64.b64encode(buffer.getvalue()).decode("ascii"), *image.size


def _mark(item: dict[str, Any], width: int, height: int) -> str:
    """A box as a rectangle, a point as a cross in a circle; coordinates 0..999, anything else is not drawn."""
    role = "gold" if item.get("role") == "gold" else "model"
    if "colour" in item:  # of a run, where there are several
        role += f' style="stroke:var(--c{item["colour"]})"'
    box, point = item.get("box"), item.get("point")
    if _numbers(box, 4):
        x1, y1, x2, y2 = coordinates.decode_box(box, width, height)
        width, height = max(0, x2 - x1), max(0, y2 - y1)
        return f'<rect class={role} x="{x1:.2f}" y="{y1:.2f}" width="{width:.2f}" height="{height:.2f}"/>'
    if _numbers(point, 2):
        x, y = coordinates.decode_point(point, width, height)
        r = max(width, height) / 24
        return (
            f'<circle class={role} cx="{x:.2f}" cy="{y:.2f}" r="{r:.2f}"/>'
            f'<path class={role} d="M{x - r:.2f} {y:.2f}h{2 * r:.2f}M{x:.2f} {y - r:.2f}v{2 * r:.2f}"/>'
        )
    return ""


def _numbers(values: Any, count: int) -> TypeGuard[Sequence[float]]:
    return (
        isinstance(values, (list, tuple)) and len(values) == count and all(isinstance(v, (int, float)) for v in values)
    )
