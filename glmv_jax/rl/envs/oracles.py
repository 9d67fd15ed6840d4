"""Scripts that know how an environment is won, to show that it can be: `players.scripted` plays them by the lines that
play a model. Each reads what a model is not shown, from the environment it is made for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from glmv_jax.data import chat, coordinates
from glmv_jax.rl.envs import browser, desk, reasoning, single, windows
from glmv_jax.rl.gym import Action

Choose = Callable[[], Action]


def call(name: str, **arguments: Any) -> Action:
    return Action(tool_calls=({"name": name, "arguments": arguments},))


def one_after_another(plan: Callable[[], list[Action]]) -> Choose:
    """Plans when the first action is asked for, which is after the reset."""
    waiting: list[Action] = []

    def choose() -> Action:
        if not waiting:
            waiting.extend(plan())
        return waiting.pop(0)

    return choose


def of_reasoning(env: reasoning.Reasoning) -> Choose:
    return lambda: Action(chat.boxed(env.entry["answer"]))


def of_single(env: single.Single) -> Choose:
    return lambda: Action(chat.boxed(env.sample.answer))


def of_windows(env: windows.Windows) -> Choose:
    return one_after_another(lambda: [call(each["name"], **each["arguments"]) for each in env.solution])


def of_lookup(env: desk.Desk) -> Choose:
    """Looks, searches and answers with what was found, which the sample's answer has no part in."""

    def plan() -> list[Action]:
        x1, y1, x2, y2 = env.sample.meta["box"]
        code = env.sample.meta["code"]
        said: Any = re.search(r"costs (\d+)", env.search(code)[0])
        price = said[1]
        return [call("crop", x1=x1, y1=y1, x2=x2, y2=y2), call("search", query=f"What does {code} cost?"),
                call("answer", text=price)]  # fmt: skip

    return one_after_another(plan)


def of_browser(env: browser.Browser) -> Choose:
    """click-test, click-button and enter-text, by the elements of the page."""

    def center(element: Any) -> dict[str, int]:
        x, y = coordinates.encode_point((element.left + element.width / 2, element.top + element.height / 2), *env.size)
        return {"x": x, "y": y}

    def elements(tag: str) -> list:
        return [each for each in env.dom.subtree_elements if each.tag == tag]

    def plan() -> list[Action]:
        wanted: Any = re.search(r'"(.*)"', env.utterance)
        buttons = elements("button")
        if entries := elements("input_text"):
            if env.source == "miniwob/enter-text":
                return [call("click", **center(entries[0])), call("type", text=wanted[1]),
                        call("click", **center(buttons[0]))]  # fmt: skip
        return [call("click", **center(next(b for b in buttons if wanted is None or b.text == wanted[1])))]

    return one_after_another(plan)
