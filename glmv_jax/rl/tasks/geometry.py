"""Figures with numbers on them and a question whose answer is computed: angles, sides, areas.

Meant for 64 x 64 pixels (64 patches of 8), numbers of 9 pixels. Figures are true to their angles and proportions; what
is asked for is marked "?" and every other number stands only in the picture. A set of numbers belongs to one split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import other_numbers

CANVAS, LETTERS = (64, 64), 9
ANGLE = {"en": ("Angle ? in degrees.", "What is angle ?"), "zh": ("？角是多少度？", "求？角的度数。")}
SIDE = {"en": ("Length of side ?", "How long is ?"), "zh": ("？边长是多少？", "求？边的长。")}
AREA = {"en": ("Area?", "What is the area?"), "zh": ("面积是多少？", "求面积。")}
ROUND = {"en": ("Perimeter?", "What is the perimeter?"), "zh": ("周长是多少？", "求周长。")}
TRIPLES = ((3, 4, 5), (5, 12, 13), (6, 8, 10), (8, 15, 17), (9, 12, 15), (12, 16, 20), (7, 24, 25), (20, 21, 29))
Point = tuple[float, float]


class Figure:
    """A picture with its pen, and a map from the figure's own coordinates (y up) to pixels."""

    def __init__(self, points: Sequence[Point], split: str, rng: np.random.Generator, margin: int = 11):
        self.picture = Image.new("RGB", CANVAS, drawing.background(split, rng))
        self.pen = ImageDraw.Draw(self.picture)
        self.ink = drawing.COLOURS[scene.choose(rng, ("black", "blue", "purple", "green"))].shade(split, rng)
        self.font = fonts.face(split, "en", rng, LETTERS)
        low, high = np.min(points, 0), np.max(points, 0)
        self.scale = min((np.array(CANVAS) - 2 * margin) / np.maximum(high - low, 1e-9))
        self.middle = (low + high) / 2
        self.words: list[str] = []

    def at(self, point: Point) -> Point:
        x, y = (np.array(point) - self.middle) * self.scale
        return CANVAS[0] / 2 + float(x), CANVAS[1] / 2 - float(y)

    def lines(self, *points: Point) -> None:
        self.pen.line([self.at(p) for p in points], fill=self.ink, width=1)

    def label(self, point: Point, words: str, dx: float = 0, dy: float = 0) -> None:
        """Words centred dx, dy pixels beside a point, all of them inside the picture."""
        x, y = self.at(point)
        half = self.font.getlength(words) / 2 + 1
        self.words.append(words)
        x = min(max(x + dx, half), CANVAS[0] - half)
        y = min(max(y + dy, LETTERS / 2 + 1), CANVAS[1] - LETTERS / 2 - 1)
        self.pen.text((x, y), words, font=self.font, fill=(20, 20, 20), anchor="mm")


def towards(a: Point, b: Point, pixels: float) -> Point:
    """The step from a towards b, in picture pixels."""
    dx, dy = b[0] - a[0], a[1] - b[1]
    length = math.hypot(dx, dy)
    return pixels * dx / length, pixels * dy / length


def triangle(split: str, rng: np.random.Generator) -> tuple[Figure, dict, int]:
    """Two angles of a triangle are given, the third is asked for."""
    while True:
        a, b = (5 * int(v) for v in rng.integers(7, 23, 2))
        c = 180 - a - b
        if 35 <= c <= 110:
            break
    # The base from (0, 0) to (1, 0); the apex where the sides at angles a and b meet.
    height = 1 / (1 / math.tan(math.radians(a)) + 1 / math.tan(math.radians(b)))
    corners = [(0.0, 0.0), (1.0, 0.0), (height / math.tan(math.radians(a)), height)]
    figure = Figure(corners, split, rng)
    figure.lines(*corners, corners[0])
    angles, asked = (a, b, c), int(rng.integers(3))
    centre = tuple(np.mean(corners, 0).tolist())
    for k, (corner, angle) in enumerate(zip(corners, angles)):
        dx, dy = towards(centre, corner, 7)
        figure.label(corner, "?" if k == asked else str(angle), dx, dy)
    return figure, ANGLE, angles[asked]


def on_a_line(split: str, rng: np.random.Generator) -> tuple[Figure, dict, int]:
    """A ray divides a straight angle: one part is given, the other is asked for."""
    given = int(rng.integers(45, 136))
    x, y = math.cos(math.radians(given)), math.sin(math.radians(given))
    figure = Figure([(-1, 0), (1, 0), (0, 1)], split, rng, margin=4)
    figure.lines((-1, 0), (1, 0))
    figure.lines((0, 0), (x, y))
    for middle, words in ((given / 2, str(given)), ((given + 180) / 2, "?")):
        dx, dy = math.cos(math.radians(middle)), -math.sin(math.radians(middle))
        figure.label((0, 0), words, 20 * dx, 18 * dy - 1)
    return figure, ANGLE, 180 - given


def right_triangle(split: str, rng: np.random.Generator) -> tuple[Figure, dict, int]:
    """Two sides of a right-angled triangle are given, the third is asked for."""
    a, b, c = scene.choose(rng, TRIPLES)
    if rng.random() < 0.5:
        a, b = b, a
    corners = [(0.0, 0.0), (float(a), 0.0), (0.0, float(b))]
    figure = Figure(corners, split, rng)
    figure.lines(*corners, corners[0])
    notch = 4 / figure.scale
    figure.lines((notch, 0), (notch, notch), (0, notch))
    sides, asked = (a, b, c), int(rng.integers(3))
    words = ["?" if k == asked else str(side) for k, side in enumerate(sides)]
    figure.label((a / 2, 0), words[0], 0, 6)
    figure.label((0, b / 2), words[1], -7, 0)
    figure.label((a / 2, b / 2), words[2], 7, -6)
    return figure, SIDE, sides[asked]


def rectangle(split: str, rng: np.random.Generator) -> tuple[Figure, dict, int]:
    """Area or perimeter of a rectangle whose sides are given."""
    a, b = sorted((int(v) for v in rng.integers(2, 13, 2)), reverse=True)
    a += a == b
    if rng.random() < 0.5:
        a, b = b, a
    figure = Figure([(0, 0), (a, b)], split, rng)
    figure.lines((0, 0), (a, 0), (a, b), (0, b), (0, 0))
    figure.label((a / 2, 0), str(a), 0, 6)
    figure.label((0, b / 2), str(b), -7, 0)
    return (figure, AREA, a * b) if rng.random() < 0.5 else (figure, ROUND, 2 * (a + b))


def half_base_height(split: str, rng: np.random.Generator) -> tuple[Figure, dict, int]:
    """Area of a triangle whose base and height are given."""
    base = 2 * int(rng.integers(3, 9))
    height = int(rng.integers(math.ceil(0.7 * base), int(1.15 * base) + 1))
    foot = base * rng.uniform(0.25, 0.75)
    figure = Figure([(0, 0), (base, height)], split, rng)
    figure.lines((0, 0), (base, 0), (foot, height), (0, 0))
    steps = 7
    for k in range(0, steps, 2):  # a dashed line
        figure.lines((foot, height * k / steps), (foot, height * (k + 1) / steps))
    figure.label((base / 2, 0), str(base), 0, 6)
    figure.label((foot, height * 0.4), str(height), 8 if foot < base / 2 else -8, 0)
    return figure, AREA, base * height // 2


FIGURES = (triangle, on_a_line, right_triangle, rectangle, half_base_height)


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, make = scene.language(rng), scene.choose(rng, FIGURES)
    while True:
        figure, forms, answer = make(split, rng)
        if read.belongs(" ".join((make.__name__, *figure.words)), split):
            break
    prompt = scene.choose(rng, forms[lang])
    return scene.sample("geometry", figure.picture, prompt, str(answer), lang, "numeric", figure=make.__name__)


LEVELS = levels.by_kind("figure", ("on_a_line", "triangle"), "rectangle", ("half_base_height", "right_triangle"))
TASKS = (Task("geometry", boxed(text.number()), other_numbers, make=generate, levels=LEVELS),)
