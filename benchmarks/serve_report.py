"""What a run of `serve_load.py` comes to: numbers, a table, a picture."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from serve_client import Outcome
from serve_questions import LENGTHS

Rows = Sequence[Mapping[str, float]]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest; zeros of nothing."""
    ordered = sorted(values) or [0.0]
    at = lambda q: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 4)  # noqa: E731
    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": round(ordered[-1], 4), "n": len(values)}


def slope(rows: Rows, name: str) -> dict[str, float]:
    """Of the course after its first fifth, a minute, by least squares, and twice its standard error."""
    import numpy as np

    kept = rows[len(rows) // 5 :]
    x, y = (np.array([row[key] for row in kept]) for key in ("second", name))
    x = (x - x.mean()) / 60
    a = float((x * y).sum() / (x * x).sum())
    rest = y - y.mean() - a * x
    error = float(np.sqrt((rest**2).sum() / max(1, len(x) - 2) / (x * x).sum()))
    return {"first": float(y[0]), "last": float(y[-1]), "a_minute": round(a, 3), "error": round(2 * error, 3)}


def told(outcomes: Sequence[Outcome], rows: Rows, ended: Mapping[str, Any], start: float) -> dict[str, Any]:
    """Everything that a run says, ready for JSON. Times are of answers that were asked for after the first seconds and
    were whole before SIGTERM."""
    counts = collections.Counter(x.how if x.how != "refused" else f"refused {x.status}" for x in outcomes)
    done = [x for x in outcomes if x.how == "finished"]
    steady = [x for x in done if x.pieces and x.asked - start > 5 and x.asked - start + x.took < ended["at"]]
    streams = [x for x in steady if x.question.body["stream"]]
    why = lambda how: sorted({x.why for x in outcomes if x.how == how})[:5]  # noqa: E731
    warm = rows[len(rows) // 5]
    more = lambda key: (rows[-1][key] - warm[key]) / (rows[-1]["second"] - warm["second"])  # noqa: E731
    return {
        "asked": len(outcomes), "counts": dict(counts), "lost": why("lost"), "told": why("told"),
        "by_wire": collections.Counter(x.question.wire for x in done),
        "by_kind": collections.Counter(x.question.kind for x in done),
        "retry_after": quantiles([x.after for x in outcomes if x.after is not None]),
        "first_piece": quantiles([x.pieces[0] for x in streams]),
        "between_pieces": quantiles([b - a for x in streams for a, b in zip(x.pieces, x.pieces[1:])]),
        "answer": quantiles([x.took for x in steady]), "rates": rates(streams),
        "pings": sum(x.pings for x in outcomes),
        "tokens_per_second": round(more("drawn"), 1), "processors": round(more("processor"), 3),
        "megabytes": slope(rows, "megabytes"), "files": slope(rows, "files"),
        "streams": quantiles([row["streams"] for row in rows]),
        "rows_running": quantiles([row["rows"] for row in rows]), **alike(done),
        "engine_compiled": ended["metrics"]["glmv_engine_compilations_total"] - ended["compiled_at_start"],
        "term": {key: ended[key] for key in ("running", "answers", "seconds", "code", "late")},
    }  # fmt: skip


def rates(streams: Sequence[Outcome]) -> dict[int, dict[str, float]]:
    """Tokens a second behind the first piece, of answers of equal length."""
    found = {}
    for wanted in LENGTHS[2:]:
        these = [x.tokens / (x.took - x.pieces[0]) for x in streams if x.tokens == wanted and len(x.pieces) > 1]
        if these:
            found[wanted] = quantiles(these) | {"p5": round(sorted(these)[len(these) // 20], 2)}
    return found


def alike(done: Sequence[Outcome]) -> dict[str, int]:
    """How many questions were asked and answered more than once, and how many of them in more than one way: what a row
    draws depends on its request alone, whatever runs beside it."""
    answers = collections.defaultdict(list)
    for x in done:
        if x.question.body["stream"]:
            answers[x.question.same].append(x.text)
    again = [texts for texts in answers.values() if len(texts) > 1]
    return {"asked_again": len(again), "answered_differently": sum(len(set(texts)) > 1 for texts in again)}


def wrong(found: Mapping[str, Any], drain: float) -> list[str]:
    """What the server did not do."""
    term, counts = found["term"], found["counts"]
    return [reason for failed, reason in (
        (counts.get("lost"), f"{counts.get('lost')} answers were lost: {found['lost']}"),
        (not counts.get("finished"), "no answer finished"),
        (found["compiled"] or found["engine_compiled"], f"compiled while it served: {found['compiled'][:5]}"),
        (term["code"] != 0, f"ended with {term['code']} after SIGTERM"),
        (term["answers"] > drain + 5, f"the last answer ended {term['answers']:.1f} s after SIGTERM"),
    ) if failed]  # fmt: skip


def table(found: Mapping[str, Any]) -> str:
    """All of it, to be read."""
    memory, files, term = found["megabytes"], found["files"], found["term"]
    lines = [
        f"{found['asked']} asked: {', '.join(f'{n} {how}' for how, n in sorted(found['counts'].items()))}", "",
        "| | p50 | p95 | p99 | most |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, key in (("to the first piece, s", "first_piece"), ("between pieces, s", "between_pieces"),
                      ("whole answers, s", "answer"), ("Retry-After, s", "retry_after")):  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(f"{found[key][q]:.4g}" for q in ("p50", "p95", "p99", "max")) + " |")
    lines += ["", "| tokens a second | p5 | p50 | p95 | answers |", "|---|---|---|---|---|"]
    for n, of in found["rates"].items():
        lines.append(f"| answers of {n} | " + " | ".join(f"{of[q]:.4g}" for q in ("p5", "p50", "p95", "n")) + " |")
    return "\n".join([
        *lines, "", f"{found['tokens_per_second']} tokens a second on {found['processors']} processors; "
        f"{found['pings']} pings; compiled while serving: {len(found['compiled'])}",
        f"memory {memory['first']:.0f} to {memory['last']:.0f} MB, {memory['a_minute']:+.2f} ± {memory['error']:.2f} a "
        f"minute; open files {files['first']:.0f} to {files['last']:.0f}",
        f"{found['asked_again']} questions were asked again, {found['answered_differently']} answered differently",
        f"SIGTERM with {term['running']} streams: the last ended after {term['answers']:.1f} s, the server with "
        f"{term['code']} after {term['seconds']:.1f}; who came later: {term['late']}",
    ])  # fmt: skip


def plot(outcomes: Sequence[Outcome], rows: Rows, start: float) -> str:
    """Memory, the wait for a first piece, and the time between pieces, over the run."""
    from glmv_jax.eval.report_svg import Series, line_chart

    streams = [x for x in outcomes if x.how == "finished" and x.question.body["stream"] and x.pieces]
    width = max(1.0, rows[-1]["second"] / 60)

    def course(values: Sequence[tuple[float, float]], q: float) -> list[tuple[float, float]]:
        bins = collections.defaultdict(list)
        for at, value in values:
            bins[int(at / width)].append(value)
        return [(n * width, sorted(found)[int(q * (len(found) - 1))]) for n, found in sorted(bins.items())]

    first = [(x.asked - start, x.pieces[0]) for x in streams]
    gaps = [(x.asked - start + b, b - a) for x in streams for a, b in zip(x.pieces, x.pieces[1:])]
    charts = [("memory of the server, MB", [Series("RSS", [(x["second"], x["megabytes"]) for x in rows], "eval")])]
    for name, values in (("to the first piece, s", first), ("between pieces, s", gaps)):
        both = [Series(f"p{int(100 * q)}", course(values, q), "eval", n) for n, q in enumerate((0.5, 0.95))]
        charts.append((f"{name}: p50, p95 (orange)", both))
    parts = [
        "<style>:root{--c0:#3b6fb6;--c1:#d08020}text{font:10px sans-serif;fill:#444}.title{font-weight:bold}"
        ".grid{stroke:#ddd}.bold{fill:none;stroke-width:1.6}"
        "@media(prefers-color-scheme:dark){text{fill:#ccc}.grid{stroke:#444}}</style>"
    ]
    for n, (title, series) in enumerate(charts):
        drawn = line_chart(series).replace(">step</text>", ">s</text>")
        parts.append(f'<text class="title" x="{380 * n + 44}" y="14">{title}</text>')
        parts.append(drawn.replace("<svg ", f'<svg x="{380 * n}" y="18" width="360" height="190" ', 1))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1130 210">{"".join(parts)}</svg>\n'
