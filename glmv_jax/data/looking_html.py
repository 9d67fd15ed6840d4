"""What sources give as one self-contained page: the tables of the terminal, histograms, and examples with pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence

from glmv_jax.data.looking import SAID, Example, Spread, Tally, spreads
from glmv_jax.data.looking_terminal import about, amounts, heaviest_weight, reasons
from glmv_jax.data.showing_html import STYLE, body, legend
from glmv_jax.data.showing_page import framed

_STYLE = STYLE + """
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--quiet) } th:first-child, td:first-child { text-align: left; padding-left: 0 }
.bins { display: inline-flex; align-items: flex-end; gap: 1px; height: 2em; width: 10em }
.bins i { flex: 1; background: var(--bar); min-height: 1px }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21em), 1fr)); gap: .8em }
article { background: var(--card); border-radius: 8px; padding: .6em .8em; min-width: 0 }
article h3 { margin: 0 0 .4em; overflow-wrap: anywhere } nav a { margin-right: .8em }
.answer { font-weight: 600; overflow-wrap: anywhere }
"""


def page(tallies: Sequence[Tally], title: str, notes: Sequence[str]) -> str:
    """The page. Texts are escaped; nothing is loaded from anywhere."""
    e, heaviest = html.escape, heaviest_weight(tallies)
    head, rows = amounts(tallies)
    links = "".join(f'<a href="#{e(tally.name)}">{e(tally.name)}</a> ' for tally in tallies)
    parts = [f"<nav>{links}</nav>", _table(head, rows)]
    parts += [f'<p class="bad">{e(note)}</p>' for note in notes]
    for tally in tallies:
        parts += [f'<p class="{"quiet" if fine else "bad"}">{e(said)}</p>' for said, fine in reasons(tally)]
    if heaviest:
        parts.append(f"<p>loss weight: {legend(heaviest)}</p>")
    for number, tally in enumerate(tallies):
        parts.append(f'<h2 id="{e(tally.name)}">{e(tally.name)}</h2>{_sizes(spreads(tally))}<div class="examples">')
        parts += [_example(example, heaviest, number) for example in tally.examples]
        parts.append("</div>")
    return framed(title, "".join(parts), _STYLE)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f'<div class="scroll"><table><tr>{names}</tr>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def _sizes(found: Sequence[Spread]) -> str:
    if not found:
        return ""
    names = "".join(f"<th>{name}</th>" for name in ("size", *SAID, "how often"))
    rows = []
    for spread in found:
        most = max(spread.bins)
        bars = "".join(f'<i style="height:{100 * n / most:.1f}%" title="{n}"></i>' for n in spread.bins)
        values = "".join(f"<td>{html.escape(value)}</td>" for value in spread.values)
        rows.append(f'<tr><td>{html.escape(spread.measure)}</td>{values}<td><span class="bins">{bars}</span></td></tr>')
    return f'<div class="scroll"><table><tr>{names}</tr>{"".join(rows)}</table></div>'


def _example(example: Example, heaviest: float, number: int) -> str:
    answer = f'<p class="answer">right answer: {html.escape(example.answer)}</p>' if example.answer else ""
    said = html.escape(about(example))
    return f'<article><h3 class="s{number % 5}">{said}</h3>{body(example.shown, heaviest)}{answer}</article>'
