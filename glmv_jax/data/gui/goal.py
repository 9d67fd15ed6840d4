"""What is to be got done in a window, and how far it is: what a step and a trajectory are judged by.

A goal is how every element has to be in the end, and which button to press when it is so. Any order of the rest will
do. The distance to it counts actions, so an action is right when it shortens the way; letters cannot be taken back, and
a press ends the dialogue, so some actions put the goal out of reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from glmv_jax.data import coordinates
from glmv_jax.data.gui import NAMES, SAYS, act
from glmv_jax.data.gui.page import Element, Look, Window

Action = dict[str, Any]  # {"name": "click" | "type", "arguments": {...}}, a call of `gui.TOOLS`


@dataclasses.dataclass(frozen=True)
class Goal:
    """elements: as they shall be. press: name of the button to press when they are, "" for none."""

    elements: tuple[Element, ...]
    press: str = ""


def draw(rng: np.random.Generator, window: Window, fillings: int, press: bool) -> tuple[str, Goal]:
    """(instruction, goal): up to `fillings` fields and check boxes to change, maybe a button to press after them."""
    says, words = SAYS[window.lang], NAMES[window.lang]
    elements, told = list(window.elements), []
    able = [n for n, element in enumerate(elements) if element.kind in ("field", "checkbox")]
    for n in rng.permutation(able)[:fillings].tolist():
        element = elements[n]
        if element.kind == "checkbox":
            told.append(says["tick"].format(element.name, words["off" if element.on else "on"]))
            elements[n] = dataclasses.replace(element, on=not element.on)
        else:
            text = str(int(rng.integers(10, 1000)))
            told.append(says["write"].format(text, element.name))
            elements[n] = dataclasses.replace(element, value=text)
    button = ""
    if press:
        buttons = window.of("button")
        button = buttons[int(rng.integers(len(buttons)))].name
        told.append(says["press"].format(button))
    return ("" if window.lang == "zh" else " ").join(told), Goal(tuple(elements), button)


def remaining(window: Window, goal: Goal) -> int | None:
    """The fewest actions from a window to a goal; 0 when it is reached, None when no action can reach it any more."""
    count = 0
    for number, (now, then) in enumerate(zip(window.elements, goal.elements, strict=True)):
        count += now.on != then.on
        if now.value != then.value:
            if not then.value.startswith(now.value):
                return None
            count += 1 if window.focus == number else 2
    if window.pressed:
        return 0 if window.pressed == goal.press and count == 0 else None
    return count + bool(goal.press)


def success(window: Window, goal: Goal) -> bool:
    """Whether the goal is reached and nothing else has been changed."""
    return remaining(window, goal) == 0


def action(window: Window, goal: Goal) -> Action | None:
    """The next action of a shortest way, fields and check boxes from top to bottom; None when there is nothing to do.

    ValueError when the goal is out of reach.
    """
    left = remaining(window, goal)
    if left is None:
        raise ValueError("the goal is out of reach of this window")
    if left == 0:
        return None
    focus = window.focus
    if focus >= 0 and window.elements[focus].value != goal.elements[focus].value:
        text = goal.elements[focus].value.removeprefix(window.elements[focus].value)
        return {"name": "type", "arguments": {"text": text}}
    pairs = zip(window.elements, goal.elements)
    undone = (now for now, then in pairs if (now.on, now.value) != (then.on, then.value))
    target = next(undone, None) or next(button for button in window.of("button") if button.name == goal.press)
    x, y = coordinates.encode_point(target.centre, *window.size)
    return {"name": "click", "arguments": {"x": x, "y": y}}


def play(window: Window, goal: Goal) -> list[tuple[Window, Action]]:
    """The windows of a shortest way, each with the action taken in it; the last leads to the goal."""
    steps = []
    while (due := action(window, goal)) is not None:
        steps.append((window, due))
        window = act(window, due)
    return steps


def to_facts(thing: Window | Goal) -> dict[str, Any]:
    """A window or a goal as JSON-able facts."""
    return dataclasses.asdict(thing)


def window_of(facts: Mapping[str, Any]) -> Window:
    """The window of `to_facts`, also after JSON."""
    paper, ink, accent = (tuple(facts["look"][name]) for name in ("paper", "ink", "accent"))
    look = Look(paper, ink, accent, facts["look"]["face"])
    return Window(**{**facts, "size": tuple(facts["size"]), "look": look, "elements": _elements(facts)})


def goal_of(facts: Mapping[str, Any]) -> Goal:
    """The goal of `to_facts`, also after JSON."""
    return Goal(_elements(facts), facts["press"])


def _elements(facts: Mapping[str, Any]) -> tuple[Element, ...]:
    return tuple(Element(**{**element, "box": tuple(element["box"])}) for element in facts["elements"])
