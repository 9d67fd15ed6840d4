"""Charts of known data: bars, lines, pies, scatter. Drawn with Pillow; `draw` returns the data beside the picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts

GRID, AXIS = (205, 205, 208), (70, 70, 75)
KINDS = ("bar", "line", "pie", "scatter")


class Plot:
    """A canvas with axes; maps data in [0, 1] x [0, 1] to pixels."""

    def __init__(self, size: tuple[int, int], split: str, rng: np.random.Generator):
        self.rng, self.split, self.size = rng, split, size
        self.picture = Image.new("RGB", size, drawing.background(split, rng))
        self.pen = ImageDraw.Draw(self.picture)
        self.font = fonts.face(split, "en", rng, int(rng.integers(7, 11)))
        names = list(drawing.COLOURS)
        self.shades = [drawing.COLOURS[names[int(i)]].shade(split, rng) for i in rng.permutation(len(names))]
        self.left, self.top, self.right, self.bottom = 10, 5, size[0] - 4, size[1] - 10

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + x * (self.right - self.left), self.bottom - y * (self.bottom - self.top)

    def axes(self) -> None:
        ticks = int(self.rng.integers(3, 6))
        grid = self.rng.random() < 0.6
        for k in range(1, ticks + 1):
            y = self.at(0, k / ticks)[1]
            if grid:
                self.pen.line((self.left, y, self.right, y), fill=GRID)
            self.pen.text((self.left - 1, y), str(k), font=self.font, fill=AXIS, anchor="rm")
        self.pen.line((self.left, self.top, self.left, self.bottom), fill=AXIS)
        self.pen.line((self.left, self.bottom, self.right, self.bottom), fill=AXIS)


def bar(plot: Plot) -> list[float]:
    plot.axes()
    values = plot.rng.uniform(0.1, 1.0, int(plot.rng.integers(3, 8)))
    for i, value in enumerate(values):
        x1, y1 = plot.at((i + 0.15) / len(values), value)
        x2, y2 = plot.at((i + 0.85) / len(values), 0)
        plot.pen.rectangle((x1, y1, x2, y2), fill=plot.shades[i % 4])
        plot.pen.text(((x1 + x2) / 2, plot.size[1] - 1), chr(65 + i), font=plot.font, fill=AXIS, anchor="mb")
    return values.tolist()


def line(plot: Plot) -> list[list[float]]:
    plot.axes()
    series = []
    for k in range(int(plot.rng.integers(1, 4))):
        steps = plot.rng.normal(0, 0.16, 9).cumsum() + plot.rng.uniform(0.2, 0.8)
        values = np.clip(steps, 0, 1).tolist()
        points = [plot.at(i / 8, value) for i, value in enumerate(values)]
        plot.pen.line(points, fill=plot.shades[k], width=int(plot.rng.integers(1, 3)))
        if plot.rng.random() < 0.4:
            for x, y in points:
                plot.pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=plot.shades[k])
        series.append(values)
    return series


def pie(plot: Plot) -> list[float]:
    shares = plot.rng.dirichlet(np.full(int(plot.rng.integers(2, 7)), 2.0))
    side = min(plot.size) - 2 * int(plot.rng.integers(3, 9))
    x = int(plot.rng.integers(2, plot.size[0] - side - 1))
    y = int(plot.rng.integers(2, plot.size[1] - side - 1))
    start = float(plot.rng.uniform(0, 360))
    for k, share in enumerate(shares):
        end = start + 360 * share
        plot.pen.pieslice((x, y, x + side, y + side), start, end, fill=plot.shades[k], outline=(255, 255, 255))
        start = end
    return shares.tolist()


def scatter(plot: Plot) -> list[list[float]]:
    plot.axes()
    clouds = []
    for k in range(int(plot.rng.integers(1, 4))):
        slope = plot.rng.uniform(-0.8, 0.8)
        x = plot.rng.uniform(0, 1, int(plot.rng.integers(6, 20)))
        y = np.clip(plot.rng.uniform(0.3, 0.7) + slope * (x - 0.5) + plot.rng.normal(0, 0.08, x.size), 0, 1)
        for px, py in map(plot.at, x, y):
            plot.pen.ellipse((px - 1.5, py - 1.5, px + 1.5, py + 1.5), fill=plot.shades[k])
        clouds.append([x.tolist(), y.tolist()])
    return clouds


def draw(rng: np.random.Generator, split: str, size: tuple[int, int] = (64, 64)) -> tuple[Image.Image, str, list]:
    """A chart of a random kind. Returns the picture, the kind and the data, scaled to [0, 1]."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    plot = Plot(size, split, rng)
    drawn: dict[str, Callable[[Plot], list]] = {"bar": bar, "line": line, "pie": pie, "scatter": scatter}
    data = drawn[kind](plot)
    return plot.picture, kind, data
