"""A report for people: tables on a terminal, the same as a page, and two reports beside each other."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SHOWN = 12  # rows of a long table
Report = Mapping[str, Any]


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def text(report: Report) -> str:
    """For a terminal."""
    lines = [headline(report)]
    for table in tables(report):
        lines += ["", table.title, *(f"  {line}" for line in _aligned([table.header, *table.rows]))]
    lines += [f"\nwarning: {line}" for line in report["warnings"]]
    return "\n".join([*lines, "", f"({report['note']})"])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = ([c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def page(report: Report) -> str:
    """As one self-contained file of HTML."""
    style = importlib.resources.files("glmv_jax.eval").joinpath("report.css").read_text(encoding="utf-8")
    e = html.escape
    parts = [f"<h1>glmv compile</h1><p>{e(headline(report))}</p>"]
    parts += [f'<p class="bad">{e(line)}</p>' for line in report["warnings"]]
    for table in tables(report):
        head = "".join(f"<th>{e(cell)}</th>" for cell in table.header)
        body = "".join(f"<tr>{''.join(f'<td>{e(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
        parts.append(f"<h2>{e(table.title)}</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
                     f"<tbody>{body}</tbody></table></div>")  # fmt: skip
    parts.append(f"<p class=quiet>{e(report['note'])}</p>")
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'>"
    title = f"<title>{e(headline(report))}</title><style>{style}</style>"
    return f"<!doctype html><html lang=en>{head}{title}<body>{''.join(parts)}</body></html>\n"


def headline(report: Report) -> str:
    """What was compiled, and whether it fits."""
    what = f"{report.get('config', report['stage'])} ({report['program']}) on {_where(report)}"
    if report["peak_hbm_bytes"] is None:
        return f"{what}: DOES NOT FIT"
    limit = report["hbm_limit_bytes"]
    used = f"{_size(report['peak_hbm_bytes'])} of {_size(limit)} of a device ({report['peak_hbm_bytes'] / limit:.0%})"
    return f"{what}: {'fits' if report['fits'] else 'DOES NOT FIT'}, {used}"


def _where(report: Report) -> str:
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    return slices + report["topology"]


def tables(report: Report) -> list[Table]:
    """All of a report, in the order of interest; of a program that was refused what is known of it."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    facts = [
        ("mesh, rules", f"{mesh}, {report['rules']}"),
        ("parameters", f"{report['parameters']:,}"),
        ("compiled in", f"{report['compile_seconds']} s and {_size(report['compile_memory_bytes'])} of this machine"),
    ]
    if report["flops"] is None:
        return [Table("program", ("", ""), facts)]
    early = ("asynchronous", "hidden")
    sent = f"{_size(report['wire_bytes'])}, {_percent(report['async_wire_fraction'])}"
    facts += [
        ("devices", str(report["devices"])),
        ("FLOPs of a device", f"{report['flops']:.3e}"),
        ("of those the model's", _share(report["model_flops"], report["flops"])),
        ("estimated compute", _seconds(report["estimated_compute_seconds"])),
        ("model's FLOPs at peak over that", _percent(report["fraction_of_peak"])),
        ("sent by a device, of that asynchronous", sent),
        ("with work behind it", _percent(report["hidden_wire_fraction"])),
        ("memory of a host", _size(report["host_bytes"])),
    ]  # fmt: skip
    total = report["estimated_compute_seconds"]
    return [
        Table("program", ("", ""), facts),
        Table("memory of a device", ("", "bytes"), [(n, _size(b)) for n, b in report["hbm"].items()]),
        Table("roofline", ("", "at least"), [(n, _seconds(s)) for n, s in report["roofline"].items()]),
        Table("estimated compute", ("of", "time", "share"),
              [(n, _seconds(s), _share(s, total)) for n, s in report["estimated_seconds"].items()]
              + [(f"beside it, {n}", _seconds(s), "") for n, s in report["seconds_on_other_cores"].items()]),
        Table("parts of the model", ("part", "pass", "FLOPs", "time", "share"),
              [(p["part"], p["pass"], f"{p['flops']:.2e}", _seconds(p["seconds"]), _share(p["seconds"], total))
               for p in report["parts"][: 2 * SHOWN]]),
        Table("collectives", ("kind", "over", "devices", "count", "sent", "asynchronous", "with work behind"),
              [(c["kind"] + (", between slices" if c["between_slices"] else ""), c["axes"], str(c["devices"]),
                str(c["count"]), _size(c["bytes"]), *(_share(c[name], c["bytes"]) for name in early))
               for c in report["collectives"]]),
        Table("largest tensors", ("tensor", "bytes", "of them padding", "operation", "part"),
              [(t["shape"], _size(t["bytes"]), _size(t["padding"]), t["operation"], t["part"])
               for t in report["largest_tensors"]]),
        Table("largest copies", ("part", "operation", "time"),
              [(c["part"], c["operation"], _seconds(c["seconds"])) for c in report["largest_copies"]]),
        Table("runs without an estimate", ("operation", "runs"),
              [(n, str(c)) for n, c in list(report["without_estimate"].items())[:SHOWN]]),
    ]  # fmt: skip


def compare(first: Report, second: Report) -> str:
    """Two reports as one table: what each says, and the ratio of the second to the first."""
    rows = [("", _name(first), _name(second), "ratio")]
    for title, path, form in _COMPARED:
        a, b = first.get(path), second.get(path)
        if a is not None or b is not None:
            ratio = f"{b / a:.2f}" if a and b is not None else ""
            rows.append((title, "-" if a is None else form(a), "-" if b is None else form(b), ratio))
    for name, a in first.get("estimated_seconds", {}).items():
        b = second.get("estimated_seconds", {}).get(name)
        if a and b is not None:
            rows.append((f"  {name}", _seconds(a), _seconds(b), f"{b / a:.2f}"))
    for kind, axes in sorted(_kinds(first) | _kinds(second)):
        a, b = (_bytes(r, kind, axes) for r in (first, second))
        rows.append((f"{kind} over {axes}", _size(a), _size(b), f"{b / a:.2f}" if a else ""))
    lines = _aligned(rows)
    new = [w for w in second["warnings"] if w not in first["warnings"]]
    gone = [w for w in first["warnings"] if w not in second["warnings"]]
    return "\n".join([*lines, *(f"only the second: {w}" for w in new), *(f"only the first: {w}" for w in gone),
                      f"({first['note']})"])  # fmt: skip


def _name(report: Report) -> str:
    return f"{report.get('config', report['stage']).rpartition('/')[2]} {_where(report)}"


def _kinds(report: Report) -> set[tuple[str, str]]:
    return {(c["kind"], c["axes"]) for c in report["collectives"]}


def _bytes(report: Report, kind: str, axes: str) -> float:
    return sum(c["bytes"] for c in report["collectives"] if (c["kind"], c["axes"]) == (kind, axes))


def _size(count: float | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _seconds(count: float) -> str:
    return f"{count:.3f} s" if count >= 1 else f"{count * 1e3:.3f} ms"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _share(part: float, whole: float) -> str:
    return _percent(part / whole if whole else None)


_COMPARED: Iterable[tuple[str, str, Any]] = (
    ("peak memory of a device", "peak_hbm_bytes", _size),
    ("memory of a host", "host_bytes", _size),
    ("FLOPs of a device", "flops", lambda x: f"{x:.3e}"),
    ("bytes to and from memory", "memory_bytes", _size),
    ("estimated compute", "estimated_compute_seconds", _seconds),
    ("model's FLOPs at peak over that", "fraction_of_peak", _percent),
    ("sent by a device", "wire_bytes", _size),
    ("of that asynchronous", "async_wire_fraction", _percent),
    ("with work behind it", "hidden_wire_fraction", _percent),
    ("compiled in, s", "compile_seconds", str),
)
