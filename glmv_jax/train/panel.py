"""What `glmv train` draws on a terminal: one panel, redrawn in place. Everything in it is known to the host already."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable

import jax
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

SHORTEST = 10  # columns of a bar
SOURCES = 36  # shown; the rest is counted
BESIDE = ("grad_norm", "lr", "accuracy", "accuracy/mean")  # metrics that are shown beside the headline


@dataclasses.dataclass
class View:
    """What is drawn. wait: what the time is called that batches take to come. seconds_left: of a time budget.

    sources: the last loss or reward of each source that was met.
    """

    name: str
    stage: str
    total: int
    headline: str = "loss"
    wait: str = "data wait"
    seconds_left: float = math.inf
    step: int = 0
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    sources: dict[str, float] = dataclasses.field(default_factory=dict)

    def update(self, step: int, values: dict[str, float], rates: dict[str, float]) -> None:
        """A step is done: its metrics, of which nan is a mean of nothing, and the rates so far."""
        self.step, self.values, self.rates = step, values, rates
        of = "ce/" if self.headline == "loss" else self.headline.partition("/")[0] + "/"
        found = {name.removeprefix(of): x for name, x in values.items() if name.startswith(of)}
        self.sources |= {name: x for name, x in found.items() if name != "mean" and not math.isnan(x)}


def draw(view: View, memory: Iterable[str] = ()) -> RenderableType:
    """The panel. memory: words, as `memory` gives them."""
    rows: list[RenderableType] = [_Bar(view), _numbers(view)]
    if view.sources:
        shown = [_pair(name, f"{x:.3g}") for name, x in list(view.sources.items())[:SOURCES]]
        more = len(view.sources) - len(shown)
        shown += [Text(f"and {more} more", style="dim")] if more else []
        rows.append(Columns(shown, padding=(0, 2)))
    if view.rates:
        rows += [_Flow(speed(view.rates)), _Flow(_shares(view))]
    if memory := list(memory):
        rows.append(_Flow([f"memory {memory[0]}", *memory[1:]]))
    stage = f" · {view.stage}" if view.stage not in ("", view.name) else ""
    return Panel(Group(*rows), title=Text(f"{view.name}{stage}", style="bold"), title_align="left", border_style="dim")


class _Flow:
    """Words side by side, as many to a line as there is room for; none is broken but one that is longer than a line."""

    def __init__(self, words: Iterable[str | Text]) -> None:
        self.words = [word if isinstance(word, Text) else Text(word) for word in words]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for word in self.words:
            if line and line.cell_len + 2 + word.cell_len > options.max_width:
                yield line
                line = Text()
            line = Text("  ").join([line, word]) if line else word
        yield line


class _Bar:
    """How far a run is: the bar and what it means on one line, or on two where that is short."""

    def __init__(self, view: View) -> None:
        left = eta(view.step, view.total, view.rates, view.seconds_left)
        percent = f"{100 * view.step // max(1, view.total)}%"
        self.bar = ProgressBar(max(1, view.total), view.step)
        self.words = [f"step {view.step:,} of {view.total:,}", percent, f"eta {left}"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if sum(map(len, self.words)) + 6 + SHORTEST > options.max_width:
            yield self.bar
            yield Segment.line()
            yield _Flow(self.words)
            return
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(ratio=1)
        for _ in self.words:
            grid.add_column(no_wrap=True)
        grid.add_row(self.bar, *self.words)
        yield grid


def _numbers(view: View) -> _Flow:
    said = [_pair(view.headline.removesuffix("/mean"), f"{view.values.get(view.headline, math.nan):.4g}", "bold")]
    said += [_pair(name.removesuffix("/mean"), f"{view.values[name]:.3g}") for name in BESIDE if name in view.values]
    return _Flow(said)


def _pair(name: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, style))


def eta(step: int, total: int, rates: dict[str, float], seconds_left: float = math.inf) -> str:
    """The time that is left, "?" before it can be told."""
    per_second = rates.get("steps_per_second", 0.0)
    return clock(min(seconds_left, (total - step) / per_second)) if per_second else "?"


def speed(rates: dict[str, float]) -> list[str]:
    """Samples, tokens and arithmetic by the second."""
    used = f" ({rates['flop_utilisation']:.0%} of peak)" if "flop_utilisation" in rates else ""
    return [
        f"{quantity(rates['samples_per_second'])} samples/s",
        f"{quantity(rates['tokens_per_second'])} tokens/s",
        f"{quantity(rates['flops_per_second'], ' ')}FLOP/s{used}",
    ]


def _shares(view: View) -> list[str]:
    parts = {"compute": "time/compute", view.wait: "data_wait", "host": "time/host"}
    return [f"{name} {view.rates[key]:.0%}" for name, key in parts.items() if key in view.rates]


def memory() -> list[str]:
    """What this process holds of the host's memory, and of the fullest of its devices, where these tell."""
    page, found = os.sysconf("SC_PAGE_SIZE"), []
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm", encoding="ascii") as file:  # Linux has it
        held = int(file.read().split()[1]) * page
        found.append(f"host {_of(held, os.sysconf('SC_PHYS_PAGES') * page)}")
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    full = max(stats, key=lambda one: one.get("bytes_in_use", 0))
    if "bytes_in_use" in full:
        found.append(f"device {_of(full['bytes_in_use'], full.get('bytes_limit', 0))}")
    return found


def _of(part: float, whole: float) -> str:
    return f"{part / 2**30:.1f}" + (f" of {whole / 2**30:.0f}" if whole else "") + " GiB"


def quantity(x: float, gap: str = "") -> str:
    """412, 26.4k, 48.1 T."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= scale:
            return f"{x / scale:.3g}{gap}{prefix}"
    return f"{x:.3g}{gap}"


def clock(seconds: float) -> str:
    """3:20, 1:02:03."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
