"""Scenes of a few objects on a plain background: what most kinds of question are asked about."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import coordinates, drawing, emoji
from glmv_jax.data.records import Sample

CANVASES = ((48, 48), (64, 32), (32, 64))
# Emoji of training concepts that are told apart at 14 pixels and have a regular plural.
OBJECTS = (
    "cat", "dog", "pig", "rabbit", "frog", "turtle", "penguin", "butterfly", "banana", "strawberry", "pineapple",
    "pizza", "automobile", "bus", "key", "bell", "umbrella", "crown", "guitar", "balloon", "sun", "house", "rose",
    "hammer",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. `colour` is "" for an emoji; `rgb` is the shade that was drawn; `box` is in pixels."""

    noun: str
    colour: str
    rgb: drawing.RGB
    box: tuple[int, int, int, int]

    def name(self, lang: str) -> str:
        """Noun in the language."""
        shape = drawing.SHAPES.get(self.noun)
        return shape[lang] if shape else emoji.load()[emoji.find(self.noun)].name(lang)

    def phrase(self, lang: str) -> str:
        """Colour and noun, as a person would point it out: "red circle", "红色圆形", "cat"."""
        colour = drawing.COLOURS[self.colour].names[lang] if self.colour else ""
        return (" " if lang == "en" else "").join(filter(None, (colour, self.name(lang))))

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the box's centre, pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def paint(self, canvas: Image.Image) -> None:
        x1, y1, x2, _ = self.box
        if self.colour:
            canvas.paste(self.rgb, (x1, y1), drawing.mask(self.noun, x2 - x1))
        else:
            picture = emoji.stamp(emoji.find(self.noun), max(x2 - x1, self.box[3] - y1))
            emoji.paste(canvas, picture, x1, y1)


def extent(noun: str, side: int) -> tuple[int, int]:
    """Width and height in pixels of an object whose longest side is `side`."""
    return (side, side) if noun in drawing.SHAPES else emoji.stamp(emoji.find(noun), side).size


def thing(noun: str, colour: str, side: int, x: int, y: int, split: str, rng: np.random.Generator) -> Thing:
    width, height = extent(noun, side)
    rgb = drawing.COLOURS[colour].shade(split, rng) if colour else (0, 0, 0)
    return Thing(noun, colour, rgb, (x, y, x + width, y + height))


def choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def distinct(rng: np.random.Generator, options: Sequence[Any], count: int) -> list[Any]:
    """`count` different options in random order."""
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]


def nouns(rng: np.random.Generator, count: int, emoji_share: float) -> list[str]:
    """Different nouns for one scene: all shapes, or with probability `emoji_share` all emoji."""
    return distinct(rng, OBJECTS if rng.random() < emoji_share else tuple(drawing.SHAPES), count)


def place(
    rng: np.random.Generator, split: str, canvas: tuple[int, int], sizes: Sequence[tuple[int, int]], gap: int = 2
) -> list[tuple[int, int]] | None:
    """Corners for boxes of the given sizes, at least `gap` pixels apart and from the edge; None when none was found."""
    corners: list[tuple[int, int]] = []
    for width, height in sizes:
        right, bottom = canvas[0] - width - gap, canvas[1] - height - gap
        for x, y in rng.integers(gap, (right + 1, bottom + 1), size=(40, 2)).tolist():
            x = drawing.snap(x, y, split, max(gap, x - 3), min(right, x + 3))
            free = all(
                x + width + gap <= a or a + w + gap <= x or y + height + gap <= b or b + h + gap <= y
                for (a, b), (w, h) in zip(corners, sizes)
            )
            if free and drawing.on_lattice(x, y, split):
                corners.append((x, y))
                break
        else:
            return None
    return corners


def scatter(
    rng: np.random.Generator,
    split: str,
    canvas: tuple[int, int],
    kinds: Sequence[tuple[str, str]],
    sides: tuple[int, int],
) -> list[Thing]:
    """Places (noun, colour) objects with sides in [low, high], smaller ones when they do not fit."""
    low, high = sides
    while True:
        drawn = [int(s) for s in rng.integers(low, high + 1, len(kinds))]
        corners = place(rng, split, canvas, [extent(noun, s) for (noun, _), s in zip(kinds, drawn)])
        if corners:
            return [thing(n, c, s, x, y, split, rng) for (n, c), s, (x, y) in zip(kinds, drawn, corners)]
        low, high = max(8, low - 1), max(8, high - 1)


def paint(canvas: tuple[int, int], things: Sequence[Thing], split: str, rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", canvas, drawing.background(split, rng))
    for each in things:
        each.paint(picture)
    return picture


def language(rng: np.random.Generator) -> str:
    return choose(rng, emoji.LANGUAGES)


def written_box(each: Thing, canvas: tuple[int, int]) -> list[int]:
    """The box in the 0..999 convention."""
    return list(coordinates.encode_box(each.box, *canvas))


def quiz(kind: str, picture: Image.Image, turns: Sequence[tuple[str, str]], *rest: Any, **facts: Any) -> Sample:
    """Several (question, answer) about one picture: the first is the sample's own, the others are `more` of it."""
    (prompt, answer), *more = turns
    return dataclasses.replace(sample(kind, picture, prompt, answer, *rest, **facts), more=tuple(more))


def description(kind: str, picture: Image.Image, prompt: str, answer: str, lang: str, **facts: Any) -> Sample:
    """A picture told in words, for pretraining: no answer box, and no task of reinforcement learning."""
    return dataclasses.replace(sample(kind, picture, prompt, answer, lang, "text", **facts), boxed=False)


def sample(kind: str, picture: Image.Image, prompt: str, answer: str, lang: str, check: str, **facts: Any) -> Sample:
    """A question about one picture. Its id is set by `Questions`, which knows the index."""
    meta = {"check": check, "lang": lang, **facts}
    return Sample(id="", source=kind, images=(picture,), prompt=prompt, answer=answer, meta=meta)
