"""What sources give, for a terminal: a table of how much of each, one of sizes, what was skipped, and examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from glmv_jax.data import looking
from glmv_jax.data.faults import LIMIT, WINDOW
from glmv_jax.data.looking import Example, Spread, Tally, spreads, tokens_share
from glmv_jax.data.showing_terminal import body, legend, plain

BLOCKS = " ▁▂▃▄▅▆▇█"
Draw = Callable[[np.ndarray, int], RenderableType]  # pixels [H, W, 3], columns -> the picture as text


def show(tallies: Sequence[Tally], title: str, notes: Sequence[str], console: Console, draw: Draw) -> None:
    """Prints what `looking.Looking.look` found. draw: of pictures, where the terminal has colours."""
    console.print(Text(title, style="bold"))
    console.print(_amounts(tallies))
    for note in notes:
        console.print(Text(note, style="red"))
    _skipped(tallies, console)
    sizes = _sizes(tallies, looking.QUANTILES)
    wide = console.measure(sizes, options=console.options.update(width=1000)).maximum > console.width
    console.print(_sizes(tallies, (0.0, 0.5, 1.0)) if wide else sizes)
    heaviest = heaviest_weight(tallies)
    if heaviest:
        console.print(Text.assemble("loss weight: ", *legend(heaviest)))
    for tally in tallies:
        for number, example in enumerate(tally.examples, start=1):
            head = f"{tally.name} {number}: {about(example)}"
            console.print(Rule(Text(plain(head)), align="left", style="dim"))
            for picture in example.shown.pictures if console.color_system else ():
                for frame in picture.frames:
                    console.print(draw(frame, console.width))
            console.print(body(example.shown, heaviest), soft_wrap=True)
            if example.answer:
                console.print(Text(f"right answer: {plain(example.answer)}", style="green"))


def heaviest_weight(tallies: Sequence[Tally]) -> float:
    """The largest loss weight of all examples, 0 where nothing is weighed."""
    return max((run.weight for tally in tallies for example in tally.examples for run in example.shown.runs),
               default=0.0)  # fmt: skip


def about(example: Example) -> str:
    """Its id, the sizes of its pictures in the source, and how many documents it gave where they are several."""
    sizes = list(dict.fromkeys(f"{width}x{height}" for width, height in example.stored))
    stored = f", stored {' '.join(sizes)}" if sizes else ""
    return f"{example.id}{stored}" + (f", the first of {example.parts} documents" if example.parts > 1 else "")


def amounts(tallies: Sequence[Tally]) -> tuple[list[str], list[list[str]]]:
    """(names of columns, a row a source) of what was drawn."""
    head = ["source", "records", "wanted", "drawn", "share", "of tokens", "broken", "left out"]
    tokens = tokens_share(tallies)
    if not any(tally.sizes.get("tokens") for tally in tallies):
        head[5] = "of patches"
    drawn = max(1, sum(tally.drawn for tally in tallies))
    rows = []
    for tally in tallies:
        records = "endless" if tally.records is None else f"{tally.records:,}"
        rows.append([tally.name, records, f"{tally.wanted:.2%}", f"{tally.drawn:,}",
                     f"{tally.drawn / drawn:.2%}", f"{tokens[tally.name]:.2%}", f"{tally.counts(False):,}",
                     f"{tally.counts(True):,}"])  # fmt: skip
    return head, rows


def reasons(tally: Tally) -> list[tuple[str, bool]]:
    """(what is said of a reason, whether it is no fault): how often, why, the first ids."""
    found = []
    for (reason, fine), (ids, n) in sorted(tally.skipped.items(), key=lambda item: -item[1][1]):
        what = "left out" if fine else "broken"
        found.append((f"{tally.name}: {n} {what}, {reason} ({', '.join(ids)}{', …' if n > len(ids) else ''})", fine))
    if tally.gave_up:
        found.append((f"{tally.name}: so many in a row failed that it was given up here; training would end: "
                      f"{tally.gave_up}", False))  # fmt: skip
    elif tally.too_many:
        share = tally.counts(False) / (tally.drawn + tally.counts(False))
        found.append((f"{tally.name}: {share:.0%} of what was read is broken; training ends when more than {LIMIT:.0%} "
                      f"of {WINDOW:,} records are", False))  # fmt: skip
    return found


def _amounts(tallies: Sequence[Tally]) -> Table:
    head, rows = amounts(tallies)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell), style="red" if n == 6 and cell != "0" else "") for n, cell in enumerate(row)))
    return table


def _skipped(tallies: Sequence[Tally], console: Console) -> None:
    for tally in tallies:
        for said, fine in reasons(tally):
            console.print(Text(plain(said), style="yellow" if fine else "red"))


def _sizes(tallies: Sequence[Tally], quantiles: Sequence[float]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    places = [looking.QUANTILES.index(q) for q in quantiles]
    for name in ("source", "size", *(looking.SAID[n] for n in places), "how often"):
        table.add_column(name, justify="left" if name in ("source", "size", "how often") else "right", no_wrap=True)
    for tally in tallies:
        for n, spread in enumerate(spreads(tally)):
            name = plain(tally.name) if n == 0 else ""
            table.add_row(Text(name), spread.measure, *(spread.values[n] for n in places), _histogram(spread))
    return table


def _histogram(spread: Spread) -> str:
    most = max(spread.bins)
    return "".join(BLOCKS[-(-8 * n // most)] for n in spread.bins)
