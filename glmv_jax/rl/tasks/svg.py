"""Code of a picture: an SVG of one to three shapes, drawn by `data.svg` and compared with what was shown.

Legible at the 48 to 64 pixels that the pictures are drawn at. Written as numbers of pixels, so a gold answer is 100 to
200 characters.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import drawing, svg
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, pictures
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score
from glmv_jax.rl.task import Task
from glmv_jax.typing import UserError

MOST = 2048  # characters
PROMPTS = {
    "en": 'Write this as SVG, viewBox="0 0 {} {}".',
    "zh": '用SVG画出这张图，viewBox="0 0 {} {}"。',
}
PIXELS = 0.6  # share of the pixels in the value; the rest is the shapes'
ENOUGH = 0.85  # a picture counts as right when its pixels and its shapes are as near as this


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, size = scene.language(rng), scene.choose(rng, scene.CANVASES)
    number = scene.choose(rng, (1, 2, 2, 3))
    colours = scene.distinct(rng, tuple(drawing.COLOURS), number)
    extents = [(int(w), int(h)) for w, h in (rng.integers(12, 23, 2) for _ in range(number))]
    corners = scene.place(rng, split, size, extents)
    while corners is None:  # they were too large together
        extents = [(max(8, w - 2), max(8, h - 2)) for w, h in extents]
        corners = scene.place(rng, split, size, extents)
    parts = [_element(rng, (x, y, w, h), drawing.COLOURS[colour].shade(split, rng))
             for (x, y), (w, h), colour in zip(corners, extents, colours)]  # fmt: skip
    code = f'<svg viewBox="0 0 {size[0]} {size[1]}">{"".join(parts)}</svg>'
    facts = {"size": list(size)}
    return scene.sample("svg", svg.rasterise(code, size), PROMPTS[lang].format(*size), code, lang, "svg", **facts)


def _element(rng: np.random.Generator, box: tuple[int, int, int, int], rgb: drawing.RGB) -> str:
    """One shape that fills a box (left, top, width, height)."""
    x, y, w, h = box
    fill = 'fill="#{:02x}{:02x}{:02x}"'.format(*rgb)
    kind = scene.choose(rng, ("rect", "circle", "ellipse", "triangle", "path", "line"))
    if kind == "circle":
        r = min(w, h) / 2
        return f'<circle cx="{x + r:g}" cy="{y + r:g}" r="{r:g}" {fill}/>'
    if kind == "ellipse":
        return f'<ellipse cx="{x + w / 2:g}" cy="{y + h / 2:g}" rx="{w / 2:g}" ry="{h / 2:g}" {fill}/>'
    if kind == "triangle":
        return f'<polygon points="{x},{y + h} {x + w / 2:g},{y} {x + w},{y + h}" {fill}/>'
    if kind == "path":  # a drop
        top, foot = f"{x + w / 2:g} {y}", f"{x + w / 2:g} {y + h}"
        return f'<path d="M{top}Q{x + w} {y + h} {foot}Q{x} {y + h} {top}Z" {fill}/>'
    if kind == "line":
        stroke = fill.replace("fill", "stroke")
        return f'<line x1="{x}" y1="{y}" x2="{x + w}" y2="{y + h}" {stroke} stroke-width="4"/>'
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" {fill}/>'


def unfenced(content: str) -> str:
    """The content without a Markdown fence around it."""
    lines = content.strip().splitlines()
    fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if fenced else content


def drawn() -> Rule:
    """A rule for SVG: PIXELS * `closeness` of the pictures + the rest * `structure` of the shapes.

    Shapes are compared by box and colours; how they are written does not count. Correct when both parts are ENOUGH.
    What cannot be drawn is wrong.
    """

    def rule(content: str, sample: Sample) -> Score:
        size = tuple(sample.meta["size"])
        try:
            found = svg.shapes(unfenced(content), size)
        except UserError:
            return WRONG
        gold, target = _gold(sample.answer, size)
        pixels = pictures.closeness(svg.paint(found, size), target)
        shapes = pictures.structure(found, gold, lambda shape: shape.box, _same)
        return Score(PIXELS * pixels + (1 - PIXELS) * shapes, min(pixels, shapes) >= ENOUGH)

    return rule


@functools.lru_cache(maxsize=64)
def _gold(code: str, size: tuple[int, int]) -> tuple[list[svg.Shape], Image.Image]:
    """Shapes and picture of a gold answer, which a whole group is compared with. Shared, do not write to them."""
    shapes = svg.shapes(code, size)
    return shapes, svg.paint(shapes, size)


def _same(a: svg.Shape, b: svg.Shape) -> float:
    return min(pictures.alike(a.fill, b.fill), pictures.alike(a.stroke, b.stroke))


def hacks(sample: Sample) -> list[str]:
    """Nothing, one colour, gold shapes in one wrong colour, a fixed drawing, many dots, and what must not be read."""
    width, height = sample.meta["size"]
    head = f'<svg viewBox="0 0 {width} {height}">'
    gold = svg.shapes(sample.answer, (width, height))
    seen: Any = gold[0].fill or gold[0].stroke
    colour = "rgb({},{},{})".format(*seen)
    whole = f'<rect width="{width}" height="{height}" fill="{{}}"/>'
    dot = f'<rect x="{{}}" y="{{}}" width="4" height="4" fill="{colour}"/>'
    dots = "".join(dot.format(n * 5 % width, n * 7 % height) for n in range(30))
    return [
        head + "</svg>",
        head + whole.format("white") + "</svg>",
        head + whole.format(colour) + "</svg>",
        sample.answer.replace("</svg>", whole.format("white") + "</svg>"),
        head + '<circle cx="24" cy="24" r="2" fill="yellow"/></svg>',
        head + dots + "</svg>",
        head + '<image href="https://example.org/a.png" width="99" height="99"/></svg>',
        '<!DOCTYPE svg [<!ENTITY a "aaaa">]>' + head + "&a;</svg>",
        sample.answer.removesuffix("</svg>"),
        sample.prompt,
        "<svg>" * 200 + "</svg>" * 200,
    ]


TASKS = (Task("svg", boxed(drawn(), most=MOST), hacks, make=generate, levels=levels.by_length(120, 150)),)
