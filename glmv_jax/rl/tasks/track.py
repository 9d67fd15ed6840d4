"""Where an object is at every second of a short film: "0:[[x1,y1,x2,y2]],1:[[...]]", no entry for a second without it.

Frames are a second apart, each with its time written after it. Legible at the 48 to 64 pixels that they are drawn at.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import coordinates, drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score
from glmv_jax.rl.task import Task

FRAMES = 4
CANVASES = ((48, 48), (64, 48), (48, 64))
PROMPTS = {
    "en": "Track the {}: second:[[box]] for each second that it is seen, commas between.",
    "zh": "跟踪{}：每个可见的秒写 秒:[[框]]，逗号分隔。",
}
Path = list[tuple[int, int, int, int] | None]  # the box in pixels at each second, None where it is not there
_COORDINATE = r"\s*([0-9]{1,3}|1000)\s*"
_ENTRY = re.compile(r"([0-9]{1,3})\s*:\s*\[\[?" + ",".join([_COORDINATE] * 4) + r"\]\]?")


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, canvas = scene.language(rng), scene.choose(rng, CANVASES)
    shapes = scene.distinct(rng, tuple(drawing.SHAPES), 3)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), 3)
    asked = _path(rng, canvas)
    if rng.random() < 1 / 3:  # it comes late or leaves early
        asked = [None, *asked[1:]] if rng.random() < 0.5 else [*asked[:-1], None]
    paths = [asked]
    for _ in range(int(rng.integers(1, 3))):
        path = next((p for p in (_path(rng, canvas) for _ in range(20)) if not any(_meet(p, q) for q in paths)), None)
        if path:
            paths.append(path)

    rgb = [drawing.COLOURS[colour].shade(split, rng) for colour in colours]
    background, film = drawing.background(split, rng), []
    for second in range(FRAMES):
        picture = Image.new("RGB", canvas, background)
        for path, shape, colour, shade in zip(paths, shapes, colours, rgb):
            if box := path[second]:
                scene.Thing(shape, colour, shade, box).paint(picture)
        film.append(picture)
    boxes = {second: coordinates.encode_box(box, *canvas) for second, box in enumerate(asked) if box}
    answer = ",".join(f"{second}:{coordinates.format_lists([box])}" for second, box in boxes.items())
    called = scene.Thing(shapes[0], colours[0], rgb[0], (0, 0, 1, 1)).phrase(lang)
    made = scene.sample("track", film[0], PROMPTS[lang].format(called), answer, lang, "track")
    return dataclasses.replace(made, images=tuple(film), times=tuple(map(float, range(FRAMES))))


def _path(rng: np.random.Generator, canvas: tuple[int, int]) -> Path:
    """A straight way on which the object moves by at least half its side a second, so that no one box tracks it."""
    while True:
        side = int(rng.integers(9, 13))
        ends = rng.integers(1, np.array(canvas) - side, size=(2, 2))
        if np.abs(ends[1] - ends[0]).max() >= (FRAMES - 1) * side / 2:
            corners = np.linspace(ends[0], ends[1], FRAMES).round().astype(int).tolist()
            return [(x, y, x + side, y + side) for x, y in corners]


def _meet(a: Path, b: Path) -> bool:
    """Whether two objects touch at some second: neither may hide the other."""
    return any(p and q and coordinates.iou(p, q) > 0 for p, q in zip(a, b))


def parse(content: str) -> dict[int, coordinates.Box] | None:
    """Second -> box of an answer that is a list of entries and nothing else; None for any other text, a second that
    comes twice, and more than 64 entries."""
    found = _ENTRY.findall(content)
    if not found or len(found) > 64 or _ENTRY.sub("", content).strip(" \n,;{}"):
        return None
    track = {}
    for second, x1, y1, x2, y2 in found:
        x1, y1, x2, y2 = map(float, (x1, y1, x2, y2))
        track[int(second)] = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    return track if len(track) == len(found) else None


def overlaps(found: dict[int, coordinates.Box], gold: dict[int, coordinates.Box]) -> dict[int, float]:
    """IoU of every second that either track has a box of; 0 where only one has it."""
    return {s: coordinates.iou(found[s], gold[s]) if s in found and s in gold else 0.0 for s in {*found, *gold}}


def tracks(*, threshold: float = 0.5, graded: float = 0.5) -> Rule:
    """A rule for tracks: graded * mean IoU + (1 - graded) * share of IoU >= threshold, over the seconds of both tracks
    together; correct when every one is hit."""

    def rule(content: str, sample: Sample) -> Score:
        found = parse(content)
        if found is None:
            return WRONG
        gold: Any = parse(sample.answer)
        ious = list(overlaps(found, gold).values())
        hits = sum(iou >= threshold for iou in ious) / len(ious)
        return Score(graded * sum(ious) / len(ious) + (1 - graded) * hits, hits == 1.0)

    return rule


def hacks(sample: Sample) -> list[str]:
    """One box for all seconds, the whole picture, one second only, seconds named twice, times shifted."""
    gold: Any = parse(sample.answer)
    written = lambda track: ",".join(f"{s}:{coordinates.format_lists([box])}" for s, box in track)  # noqa: E731
    seconds, first, last = range(FRAMES), min(gold), max(gold)
    return [
        written((s, gold[first]) for s in seconds),
        written((s, (0, 0, 999, 999)) for s in seconds),
        written([(first, gold[first])]),
        written((s, gold[s]) for s in [*gold, *gold]),
        written((s + 1, box) for s, box in gold.items()),
        written((s, gold.get(s, (0, 0, 999, 999))) for s in range(60)),
        written((s, gold[first + last - s]) for s in gold),
        coordinates.format_lists(gold.values()),
        sample.answer + " or 0:[[0,0,999,999]]",
    ]


TASKS = (Task("track", boxed(tracks()), hacks, make=generate, levels=levels.by_count("[[", 4)),)
