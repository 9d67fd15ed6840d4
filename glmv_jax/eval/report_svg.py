"""Line charts as inline SVG: no script, no font, no library; colours are CSS variables, so light and dark both work."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from glmv_jax.eval.report_run import Point

WIDTH, HEIGHT = 360, 190  # of the view box; the page scales it to the column
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22
COLOURS = 6  # --c0 ... --c5 in the style sheet
MAX_POINTS = 240


class Series(NamedTuple):
    """A curve. `kind` "train" is drawn as a pale line under its running mean, "eval" as a line with a dot a value,
    "mean" as a line on its band: (step, low, high), "marks" as rings. colour: from `COLOURS` on the colours come
    again, broken. group: a class by which the page can take the curve away."""

    name: str
    points: list[Point]
    kind: str = "train"
    colour: int = 0
    band: list[tuple[float, float, float]] = []
    group: str = ""


def line_chart(series: list[Series]) -> str:
    """An `<svg>` of all the series on common axes. Steps go right, values up; the axes fit the data."""
    every = [point for one in series for point in one.points]
    every += [(x, y) for one in series for x, *ends in one.band for y in ends]
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every), 5)
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every), 4)
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - low_x) / ((high_x - low_x) or 1)
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (point[1] - low_y) / ((high_y - low_y) or 1)
        return round(x, 1), round(y, 1)

    parts = []
    for value in y_ticks:
        _, y = place((low_x, value))
        zero = " zero" if value == 0 and low_y < 0 else ""
        parts.append(f'<path class="grid{zero}" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3}" text-anchor="end">{label(value)}</text>')
    for value in x_ticks:
        x, _ = place((value, low_y))
        if LEFT + 8 <= x <= WIDTH - RIGHT:
            parts.append(f'<text x="{x}" y="{HEIGHT - 7}" text-anchor="{_anchor(x)}">{label(value)}</text>')
    for one in series:
        drawn = _curve(one, place)
        again = f"dash{one.colour // COLOURS}" if one.colour >= COLOURS else ""
        classes = " ".join(filter(None, (one.group, again)))
        parts += [f'<g class="{classes}">', *drawn, "</g>"] if classes else drawn
    parts.append(f'<text x="{LEFT - 5}" y="{HEIGHT - 7}" text-anchor="end">step</text>')
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def dot_chart(title: str, values: Mapping[str, Sequence[float]], *, zero: bool = False, **more: Any) -> str:
    """An `<svg>` of one `dot_panel`."""
    parts = dot_panel(title, values, WIDTH, HEIGHT, zero=zero, **more)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def dot_panel(
    title: str, values: Mapping[str, Sequence[float]], wide: float, high: float, x0: float = 0.0, *, zero: bool = True,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> list[str]:  # fmt: skip
    """A column a name: a dot a value, a bar at their mean, and where given a line from low to high. The elements have
    the classes title, grid, mean, span and dot, and are moved x0 to the right.

    zero: the axis begins at 0; else it fits the values.
    """
    left, top, bottom = 40, 26, 34
    every = [v for column in (*values.values(), *(intervals or {}).values()) for v in column]
    marks = ticks(0.0 if zero else min(every), max(every), 4)
    y_of = lambda v: high - bottom - (high - top - bottom) * (v - marks[0]) / (marks[-1] - marks[0])  # noqa: E731
    parts = [f'<text class="title" x="{x0 + left:g}" y="14">{html.escape(title)}</text>'] if title else []
    for mark in marks:
        y = y_of(mark)
        parts.append(f'<path class="grid" d="M{x0 + left:g} {y:.1f}H{x0 + wide - 8:g}"/>')
        parts.append(f'<text x="{x0 + left - 5:g}" y="{y + 3:.1f}" text-anchor="end">{label(mark)}</text>')
    step = (wide - left - 8) / len(values)
    for i, (name, column) in enumerate(values.items()):
        x, colour = x0 + left + (i + 0.5) * step, f"var(--c{i % COLOURS})"
        if intervals and name in intervals:
            low, top_end = map(y_of, intervals[name])
            parts.append(f'<path class="span" d="M{x:.1f} {low:.1f}V{top_end:.1f}"/>')
        if column:
            parts.append(f'<path class="mean" d="M{x - 13:.1f} {y_of(sum(column) / len(column)):.1f}h26"/>')
        parts += [
            f'<circle class="dot" style="--dot:{colour}" cx="{x:.1f}" cy="{y_of(v):.1f}" r="3.5"/>' for v in column
        ]
        parts.append(f'<text x="{x:.1f}" y="{high - bottom + 14:g}" text-anchor="middle">{html.escape(name)}</text>')
    return parts


def _anchor(x: float) -> str:
    return "end" if x > WIDTH - RIGHT - 12 else "middle"


def _curve(series: Series, place: Callable) -> list[str]:
    colour = f"var(--c{series.colour % COLOURS})"
    name = html.escape(series.name)
    if series.kind == "mean":
        edges = [[(x, ends[i]) for x, *ends in series.band] for i in (0, 1)]
        around = [place(point) for point in [*thin(edges[1]), *reversed(thin(edges[0]))]]
        area = [f'<path class="band" fill="{colour}" d="{_path(around)}Z"/>'] if around else []
        line = _path([place(point) for point in thin(series.points)])
        return [*area, f'<path class="bold" stroke="{colour}" d="{line}"><title>{name}</title></path>']
    if series.kind == "marks":
        found = ((place(point), point) for point in series.points)
        return [f'<circle class="ring" stroke="{colour}" cx="{x}" cy="{y}" r="4"><title>{name}, step {step:g}: '
                f"{value:.4g}</title></circle>" for (x, y), (step, value) in found]  # fmt: skip
    if series.kind == "train" and len(series.points) > 8:
        pale = _path([place(point) for point in thin(series.points)])
        bold = _path([place(point) for point in thin(running_mean(series.points))])
        return [
            f'<path class="pale" stroke="{colour}" d="{pale}"/>',
            f'<path class="bold" stroke="{colour}" d="{bold}"><title>{name}</title></path>',
        ]
    dots = [
        f'<circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"><title>{name}, step {step:g}: {value:.4g}</title></circle>'
        for (x, y), (step, value) in ((place(point), point) for point in thin(series.points))
    ]
    return [f'<path class="bold" stroke="{colour}" d="{_path([place(p) for p in thin(series.points)])}"/>', *dots]


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def thin(points: list[Point]) -> list[Point]:
    """At most about MAX_POINTS points, each the mean of a run of neighbours; the last point stays."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups[:-1]] + [points[-1]]


def running_mean(points: list[Point]) -> list[Point]:
    """Each value's mean with its neighbours, over a window of about a twentieth of the run; shorter at the ends."""
    reach = max(1, len(points) // 40)
    smooth = []
    for i, (x, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)  # the same on both sides, or a falling curve would be moved
        window = points[i - side : i + side + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that enclose [low, high], about `about` of them."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def label(value: float) -> str:
    """A tick's number in few characters: 0.25, 12, 3k, 2.5M, 1e-05."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
