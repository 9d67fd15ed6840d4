"""The report's tables on a terminal: as wide as it is, whatever its width, and never a number over two lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from glmv_jax.eval.report_tables import Table

_LEFT = ("metric", "arm", "arms")  # columns of words
_TONES = {"good": "green", "bad": "red", "quiet": "dim", "head": "bold", "": ""}
_LONG = 16  # characters of a cell that may be folded: no number has as many


def show(content: Table, console: Console) -> None:
    """Prints a table; one that is too wide comes closer, and then in parts, each with the first column."""
    console.print(Text(f"\n{content.title}", style="bold"))
    if content.rows:
        for drawn in _fitting(content, console):
            console.print(drawn)
    if content.note:
        console.print(Text(content.note, style="dim"))


def _fitting(content: Table, console: Console) -> list[RichTable]:
    for close, stacked in ((False, False), (False, True), (True, True)):
        drawn = _drawn(content, close, stacked)
        if _least(drawn, console) <= console.width:
            return [drawn]
    return [_drawn(part, True, True) for part in _parts(content, console)]


def _parts(content: Table, console: Console) -> Iterator[Table]:
    """As few as possible; a column that does not fit beside the first is one of its own."""
    start = 1
    while start < len(content.header):
        stop = start + 1
        while stop < len(content.header):
            if _least(_drawn(_columns(content, start, stop + 1), True, True), console) > console.width:
                break
            stop += 1
        yield _columns(content, start, stop)
        start = stop


def _columns(content: Table, start: int, stop: int) -> Table:
    take = lambda row: [row[0], *row[start:stop]]  # noqa: E731
    return dataclasses.replace(content, header=take(content.header), rows=[take(row) for row in content.rows])


def _least(drawn: RichTable, console: Console) -> int:
    """The width that it needs."""
    return console.measure(drawn, options=console.options.update(width=10_000)).minimum


def _drawn(content: Table, close: bool, stacked: bool) -> RichTable:
    """close: one space between columns. stacked: the words of a column's name stand below each other."""
    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0 if close else 1), collapse_padding=True)
    for i, name in enumerate(content.header):
        words = i == 0 or name in _LEFT or content.kind == "values"
        shown = name.replace(" ", "\n") if stacked else name
        cells = [row[i].text for row in content.rows]
        whole = i == 0 or not (words or max(map(len, cells), default=0) > _LONG)
        least = max(map(cell_len, (*shown.split("\n"), *cells))) if whole else None
        drawn.add_column(Text(shown), justify="left" if words else "right", overflow="fold", min_width=least)
    for row in content.rows:
        drawn.add_row(*(Text(cell.text, style=_TONES[cell.tone]) for cell in row))
    return drawn
