"""Spot the difference: two pictures of one scene, and the one object of the second that is not as in the first.

Meant for two pictures of 48 x 48 pixels (36 patches of 8 each), objects of 10 pixels and more. An object has another
colour, another shape, another place, or is new; the answer is a point on it in the second picture.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import coordinates, drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, geometry
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import scattered

CANVAS = (48, 48)
PROMPTS = {
    "en": ("Point at what differs in the second.", "What is not as in the first? Point."),
    "zh": ("指出第二张图中的不同之处。", "第二张图哪里变了？给出点。"),
}
CHANGES = ("colour", "shape", "place", "new")
LEAST_MOVE = 10  # pixels


def changed(things: list[scene.Thing], how: str, split: str, rng: np.random.Generator) -> list[scene.Thing] | None:
    """The second scene, its last object the one that differs; None when no place was found."""
    *rest, last = things
    if how == "new":
        return things  # the first scene is without it
    if how == "colour":
        colour = scene.choose(rng, [c for c in drawing.COLOURS if c != last.colour])
        return [*rest, dataclasses.replace(last, colour=colour, rgb=drawing.COLOURS[colour].shade(split, rng))]
    if how == "shape":
        return [*rest, dataclasses.replace(last, noun=scene.choose(rng, [s for s in drawing.SHAPES if s != last.noun]))]
    side = last.box[2] - last.box[0]
    for _ in range(40):
        placed: Any = scene.place(rng, split, CANVAS, [(side, side)])  # there is room for one
        x, y = placed[0]
        moved = dataclasses.replace(last, box=(x, y, x + side, y + side))
        far = max(abs(x - last.box[0]), abs(y - last.box[1])) >= LEAST_MOVE
        if far and all(free(moved, thing) for thing in things):
            return [*rest, moved]
    return None


def free(a: scene.Thing, b: scene.Thing, gap: int = 2) -> bool:
    """Whether two objects are at least `gap` pixels apart."""
    return any(a.box[k] >= b.box[k + 2] + gap or b.box[k] >= a.box[k + 2] + gap for k in (0, 1))


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, how = scene.language(rng), scene.choose(rng, CHANGES)
    while True:
        count = int(rng.integers(3, 6))
        kinds = [(scene.choose(rng, tuple(drawing.SHAPES)), scene.choose(rng, tuple(drawing.COLOURS)))
                 for _ in range(count)]  # fmt: skip
        before = scene.scatter(rng, split, CANVAS, kinds, (10, 14))
        after = changed(before, how, split, rng)
        if after is not None:
            break
    paper = drawing.background(split, rng)
    pictures = []
    for things in (before[:-1] if how == "new" else before, after):
        picture = Image.new("RGB", CANVAS, paper)
        for thing in things:
            thing.paint(picture)
        pictures.append(picture)
    answer = coordinates.format_lists([coordinates.encode_point(after[-1].centre, *CANVAS)])
    *others, box = (scene.written_box(thing, CANVAS) for thing in after)
    facts = {"boxes": [box], "others": others, "change": how}
    drawn = scene.sample("difference", pictures[1], scene.choose(rng, PROMPTS[lang]), answer, lang, "point", **facts)
    return dataclasses.replace(drawn, images=tuple(pictures))


def elsewhere(sample: Sample) -> list[str]:
    """What cheats any pointing, the middles of the other objects, and all middles at once."""
    middles = [[(x1 + x2) // 2, (y1 + y2) // 2] for x1, y1, x2, y2 in sample.meta["others"]]
    return [*scattered(sample), *(coordinates.format_lists([m]) for m in middles), coordinates.format_lists(middles)]


LEVELS = levels.by_number("others", 3, 4)
TASKS = (Task("difference", boxed(geometry.point(reach=150.0, graded=0.3)), elsewhere, make=generate, levels=LEVELS),)
