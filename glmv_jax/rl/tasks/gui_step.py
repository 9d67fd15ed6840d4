"""The next action for one instruction, the third of the four levels of GUI tasks: "click [[x,y]]" or "type 52".

An action is right when the window after it is nearer to what is wanted, by `data.gui.goal`: any point of the element
will do. Legible at the 96 to 128 pixels that `data.gui` draws windows at.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from glmv_jax.data import coordinates
from glmv_jax.data.gui import act, goal, page
from glmv_jax.data.gui.page import Window
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, geometry
from glmv_jax.rl.rewards.grade import RIGHT, WRONG, Rule, Score
from glmv_jax.rl.task import Task

FORM = {"en": " Next: click [[x,y]], type TEXT or done.", "zh": "下一步：click [[x,y]]、type 文字 或 done。"}
NEAR, REACH = 0.3, 300.0  # the most that a click beside the element earns, and up to how many thousandths from it
_CLICK = re.compile(r"click\s*\[\[\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\]\]", re.IGNORECASE)
_TYPE = re.compile(r"type ([^\n]{1,60})", re.IGNORECASE)


def written(action: goal.Action | None) -> str:
    """A tool call as it is answered in one line; None is "done"."""
    if action is None:
        return "done"
    given = action["arguments"]
    if action["name"] == "type":
        return f"type {given['text']}"
    return "click " + coordinates.format_lists([(given["x"], given["y"])])


def parse(content: str) -> goal.Action | None | str:
    """The tool call of one line, None for "done", "" for anything else."""
    content = content.strip()
    if content.casefold() == "done":
        return None
    if found := _CLICK.fullmatch(content):
        x, y = int(found[1]), int(found[2])
        return {"name": "click", "arguments": {"x": x, "y": y}} if max(x, y) <= coordinates.SCALE else ""
    found = _TYPE.fullmatch(content)
    return {"name": "type", "arguments": {"text": found[1]}} if found else ""


def generate(rng: np.random.Generator, split: str) -> Sample:
    window = page.generate(rng, split)
    press = bool(rng.random() < 0.3)
    instruction, aim = goal.draw(rng, window, 0 if press else 1, press)
    way = goal.play(window, aim)
    now, due = scene.choose(rng, way)  # of a field also the second action, when it has been clicked
    facts = {"window": goal.to_facts(now), "goal": goal.to_facts(aim)}
    prompt = instruction + FORM[window.lang]
    return scene.sample("gui_step", page.draw(now), prompt, written(due), window.lang, "action", **facts)


def nearer() -> Rule:
    """A rule for the next action: right when it shortens the way to meta["goal"] from meta["window"], or when it is
    "done" and there is nothing left to do. A click beside an element that had to be clicked earns up to NEAR."""

    def rule(content: str, sample: Sample) -> Score:
        window, aim = goal.window_of(sample.meta["window"]), goal.goal_of(sample.meta["goal"])
        action, left = parse(content), goal.remaining(window, aim)
        if isinstance(action, str) or (action is None) != (left == 0):
            return WRONG
        if action is None or _shorter(window, aim, action):
            return RIGHT
        if action["name"] == "type":
            return WRONG
        point = (action["arguments"]["x"], action["arguments"]["y"])
        away = [geometry.outside(point, box) for box in _targets(window, aim)]
        return Score(NEAR * max(0.0, 1.0 - min(away) / REACH) if away else 0.0, False)

    return rule


def _shorter(window: Window, aim: goal.Goal, action: Any) -> bool:
    after, left = goal.remaining(act(window, action), aim), goal.remaining(window, aim)
    return after is not None and left is not None and after < left


def _targets(window: Window, aim: goal.Goal) -> list[tuple[int, ...]]:
    """Boxes in 0..999 of the elements a click on which shortens the way."""
    clicks = [window.click(*element.centre) for element in window.elements]
    left = goal.remaining(window, aim)
    nearer = [left is not None and (after := goal.remaining(each, aim)) is not None and after < left for each in clicks]
    return [coordinates.encode_box(e.box, *window.size) for e, right in zip(window.elements, nearer) if right]


def hacks(sample: Sample) -> list[str]:
    """Clicks on every other element and in every corner, other letters, several actions at once, and doing nothing."""
    window, aim = goal.window_of(sample.meta["window"]), goal.goal_of(sample.meta["goal"])
    points = [coordinates.encode_point(element.centre, *window.size) for element in window.elements]
    clicks = ["click " + coordinates.format_lists([point]) for point in [*points, (0, 0), (999, 999), (0, 999)]]
    wrong = [click for click in clicks if not _shorter(window, aim, parse(click))]
    letters = ["type 0", "type " + " ".join(map(str, range(20)))]
    both = f"{sample.answer}\n{sample.answer}"
    many = "click " + coordinates.format_lists(points)
    return [*wrong, *letters, both, many, "click", "type", "type ", "click [[1001,5]]",
            "click [[5,5]]" if sample.answer == "done" else "done"]  # fmt: skip


LEVELS = levels.by(lambda s: len(s.meta["window"]["elements"]), 7)
TASKS = (Task("gui_step", boxed(nearer()), hacks, make=generate, levels=LEVELS),)
