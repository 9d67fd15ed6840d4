"""When what happens in a short film: an object comes, goes, changes its colour, or is there from when to when.

A film is FRAMES pictures, half a second to two seconds apart, each with its time written after it. Legible at the 48
pixels that they are drawn at.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score
from glmv_jax.rl.task import Task

FRAMES = 6
STEPS = (0.5, 1.0, 2.0)  # seconds between frames, so that a frame's number is not its time
PROMPTS = {
    "come": {"en": "When does the {} appear? Seconds.", "zh": "{}什么时候出现？秒。"},
    "go": {"en": "When is the {} gone? Seconds.", "zh": "{}什么时候消失？秒。"},
    "turn": {"en": "When does the {} change its colour? Seconds.", "zh": "{}什么时候变色？秒。"},
    "span": {"en": "From when to when is the {} seen? [[first,last]]", "zh": "{}从何时到何时可见？[[首,末]]"},
    "which": {"en": "What appears at {} seconds?", "zh": "{}秒时什么出现？"},
}
NEAR = 0.3  # the most that a wrong moment earns: one next to the right one
_SPAN = re.compile(r"\[*\s*([0-9]{1,4}(?:\.[0-9]{1,3})?)\s*,\s*([0-9]{1,4}(?:\.[0-9]{1,3})?)\s*\]*")


@dataclasses.dataclass(frozen=True)
class Story:
    """Of one object: the frame it is first seen in, the first it is no more in, the first with its second colour."""

    come: int = 0
    go: int = FRAMES
    turn: int = FRAMES


def _story(rng: np.random.Generator, form: str) -> Story:
    """What happens, happens after the first frame; a span also ends before the last."""
    at = int(rng.integers(1, FRAMES))
    if form == "span":
        return Story(come := int(rng.integers(1, FRAMES - 2)), come + int(rng.integers(2, FRAMES - come)))
    return {"come": Story(come=at), "go": Story(go=at), "turn": Story(turn=at), "stay": Story()}[form]


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, form, step = scene.language(rng), scene.choose(rng, tuple(PROMPTS)), scene.choose(rng, STEPS)
    canvas, shapes = scene.choose(rng, scene.CANVASES), scene.distinct(rng, tuple(drawing.SHAPES), 3)
    first = scene.distinct(rng, tuple(drawing.COLOURS), 6)
    things = scene.scatter(rng, split, canvas, list(zip(shapes, first)), (12, 18))
    others = ("come", "come") if form == "which" else [scene.choose(rng, ("come", "go", "stay")) for _ in range(2)]
    stories = [_story(rng, "come" if form == "which" else form), *(_story(rng, other) for other in others)]
    if form == "which":  # at different moments
        stories = [Story(come=int(n) + 1) for n in rng.permutation(FRAMES - 1)[:3]]
    second = [dataclasses.replace(thing, colour=colour, rgb=drawing.COLOURS[colour].shade(split, rng))
              for thing, colour in zip(things, first[3:])]  # fmt: skip
    film = _paint(canvas, drawing.background(split, rng), things, second, stories)

    times = tuple(step * n for n in range(FRAMES))
    seen, story = things[0], stories[0]
    called = seen.name(lang) if form == "turn" else seen.phrase(lang)
    facts = {"form": form, "step": step}
    if form == "which":
        called, answer = f"{times[story.come]:.1f}", seen.phrase(lang)
        facts |= {"choices": [thing.phrase(lang) for thing in things], "aliases": [seen.name(lang)]}
    elif form == "span":
        answer = f"[[{times[story.come]:.1f},{times[story.go - 1]:.1f}]]"
    else:
        answer = f"{times[getattr(story, form)]:.1f}"
    asked = PROMPTS[form][lang].format(called)
    made = scene.sample("event", film[0], asked, answer, lang, "exact" if form == "which" else "numeric", **facts)
    return dataclasses.replace(made, images=film, times=times)


def _paint(canvas: Any, background: Any, things: Any, second: Any, stories: Any) -> tuple[Image.Image, ...]:
    film = []
    for frame in range(FRAMES):
        picture = Image.new("RGB", canvas, background)
        for before, after, story in zip(things, second, stories):
            if story.come <= frame < story.go:
                (before if frame < story.turn else after).paint(picture)
        film.append(picture)
    return tuple(film)


def span(content: str) -> tuple[float, float] | None:
    """(first, last) seconds of a content that is one span and nothing else, rising; else None."""
    found = _SPAN.fullmatch(content.strip())
    pair = (float(found[1]), float(found[2])) if found else None
    return pair if pair and pair[0] <= pair[1] else None


def overlap(a: tuple[float, float], b: tuple[float, float], step: float) -> float:
    """Intersection over union of two spans of frames; each frame lasts `step` seconds, so none is empty."""
    inner = min(a[1], b[1]) - max(a[0], b[0]) + step
    outer = max(a[1], b[1]) - min(a[0], b[0]) + step
    return max(0.0, inner) / outer


def moments() -> Rule:
    """A rule for the five forms. A moment is right within a quarter of a frame; one or two frames off earn up to NEAR,
    a span of the wrong length half its overlap in time."""

    def rule(content: str, sample: Sample) -> Score:
        form, step = sample.meta["form"], sample.meta["step"]
        if form == "which":
            return text.exact(content, sample)
        if form == "span":
            found = span(content)
            gold: Any = span(sample.answer)
            if found is None:
                return WRONG
            right = max(abs(found[0] - gold[0]), abs(found[1] - gold[1])) <= step / 4
            return Score(1.0 if right else 0.5 * overlap(found, gold, step), right)
        value = text.parse_number(content)
        if value is None:
            return WRONG
        off = abs(value - float(sample.answer)) / step
        return Score(1.0, True) if off <= 0.25 else Score(NEAR * max(0.0, 1.0 - off / 2), False)

    return rule


def hacks(sample: Sample) -> list[str]:
    """Every moment at once, the whole film, each wrong moment, each other object."""
    if sample.meta["form"] == "which":
        wrong = [choice for choice in sample.meta["choices"] if choice != sample.answer]
        return [*wrong, " ".join(sample.meta["choices"]), ", ".join(sample.meta["choices"])]
    times = [f"{t:.1f}" for t in sample.times]
    spread = [",".join(times), " ".join(times), f"{times[0]} to {times[-1]}", f"[[{times[0]},{times[-1]}]]"]
    if sample.meta["form"] == "span":
        gold: Any = span(sample.answer)
        first, last = gold
        return [*spread, f"[[{last},{first}]]", f"[[{first},{last}],[{first},{last}]]", f"{first}", "[[0,9999]]",
                f"[[{first - sample.meta['step']},{last}]]"]  # fmt: skip
    return spread + [time for time in times if time != sample.answer] + [f"{sample.answer} {sample.answer}", "1e1"]


LEVELS = levels.by_kind("form", ("come", "go"), "which", ("turn", "span"))
TASKS = (Task("event", boxed(moments()), hacks, make=generate, levels=LEVELS),)
