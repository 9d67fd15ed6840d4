"""User interfaces from the bottom up: what is there, where it is, what to do, how to get something done; and whether
what another says of a window is true. The hierarchy of section 4 of the report, on windows drawn from a tree (`page`).

    perceive     what is at a point, or all elements with their boxes
    ground       the box of the element that is named
    step         one action for an instruction: a click or letters
    trajectory   a goal of two or three things, the last of them a press: an action a turn, each answered by the window
                 after it
    critic       a description of the window by another model, right or with one mistake: which

Actions are tool calls, `click` (x and y in 0..999) and `type`. Records are those of `local.schema`, made from seeds;
the answers are the tree's.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from glmv_jax.data import coordinates, documents
from glmv_jax.data.gui import page
from glmv_jax.data.gui.page import Element, Window
from glmv_jax.data.local.schema import Media, Record
from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.typing import UserError

NAMES = {
    "en": {"label": "label", "field": "field", "checkbox": "check box", "button": "button", "on": "on", "off": "off"},
    "zh": {"label": "标签", "field": "输入框", "checkbox": "复选框", "button": "按钮", "on": "开", "off": "关"},
}
_INTEGER = {"type": "integer"}
TOOLS = (
    {"type": "function", "function": {"name": "click", "parameters": {
        "type": "object", "properties": {"x": _INTEGER, "y": _INTEGER}, "required": ["x", "y"]}}},
    {"type": "function", "function": {"name": "type", "parameters": {
        "type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}}},
)  # fmt: skip
SAYS = {
    "en": {"point": "What is at {}?", "all": "Which elements are there?", "box": "Box of the {} {}.",
           "press": "Press {}.", "tick": "Turn {} {}.", "write": "Write {} into {}.", "and": " Then: ",
           "done": "Done.", "check": "Is this right? {}", "right": "Right.", "wrong": "Wrong: {}"},
    "zh": {"point": "{}处是什么？", "all": "有哪些元素？", "box": "{}{}的框。",
           "press": "按{}。", "tick": "把{}设为{}。", "write": "在{1}中输入{0}。", "and": "然后：",
           "done": "完成。", "check": "这对吗？{}", "right": "对。", "wrong": "错：{}"},
}  # fmt: skip


def described(window: Window, element: Element, box: tuple[int, ...] | None = None) -> str:
    """One element in words: its kind, name, state and box."""
    words, state = NAMES[window.lang], ""
    if element.kind == "checkbox":
        state = " " + words["on" if element.on else "off"]
    elif element.kind == "field" and element.value:
        state = f" {element.value}"
    where = coordinates.format_lists([box or coordinates.encode_box(element.box, *window.size)])
    return f"{words[element.kind]} {element.name}{state} {where}"


def perceive(rng: np.random.Generator, split: str) -> Record:
    window = page.generate(rng, split)
    says = SAYS[window.lang]
    if rng.random() < 0.5:
        element = _any(rng, window.elements)
        point = coordinates.format_lists([_written(window, element)])
        return _asked(window, says["point"].format(point), described(window, element))
    return _asked(window, says["all"], "\n".join(described(window, element) for element in window.elements))


def ground(rng: np.random.Generator, split: str) -> Record:
    window = page.generate(rng, split)
    element = _any(rng, window.elements)
    asked = SAYS[window.lang]["box"].format(NAMES[window.lang][element.kind], element.name)
    return _asked(window, asked, coordinates.format_lists([coordinates.encode_box(element.box, *window.size)]))


def step(rng: np.random.Generator, split: str) -> Record:
    window = page.generate(rng, split)
    instruction, actions, _ = _any(rng, _wishes(rng, window))
    # A field needs two actions; the second one is asked for when the first has been done.
    done = int(rng.integers(len(actions)))
    for action in actions[:done]:
        window = act(window, action)
    return _conversation([(window, instruction)], [[actions[done]]], closing="")


def wanted(rng: np.random.Generator, split: str) -> tuple[Window, str, list[dict[str, Any]]]:
    """A window, what is to be done in it, and the actions that do it, the last of them a press."""
    window = page.generate(rng, split)
    wishes = _wishes(rng, window)
    fillings, presses = ([wish for wish in wishes if wish[2] == last] for last in (False, True))
    order = rng.permutation(len(fillings))[: int(rng.integers(1, 3))]
    chosen = [*(fillings[n] for n in order), _any(rng, presses)]
    instruction = SAYS[window.lang]["and"].join(instruction for instruction, *_ in chosen)
    return window, instruction, [action for _, some, _ in chosen for action in some]


def trajectory(rng: np.random.Generator, split: str) -> Record:
    window, instruction, actions = wanted(rng, split)
    seen = [(window, instruction)]
    for action in actions:
        window = act(window, action)
        seen.append((window, ""))
    return _conversation(seen, [[action] for action in actions], closing=SAYS[window.lang]["done"])


def critic(rng: np.random.Generator, split: str) -> Record:
    """Another model's description of two or three elements; in half of them one thing is not so."""
    window = page.generate(rng, split)
    says = SAYS[window.lang]
    chosen = [window.elements[n] for n in sorted(rng.permutation(len(window.elements))[:3].tolist())]
    lines, wrong = [described(window, element) for element in chosen], None
    if rng.random() < 0.5:
        at = int(rng.integers(len(chosen)))
        wrong, lines[at] = lines[at], mistaken(rng, window, chosen[at])
    answer = says["right"] if wrong is None else says["wrong"].format(wrong)
    return _asked(window, says["check"].format("\n" + "\n".join(lines)), answer)


def mistaken(rng: np.random.Generator, window: Window, element: Element) -> str:
    """The element described with one mistake: its name, its state, or the box of another."""
    form = rng.integers(3)
    if form == 0 and element.kind == "checkbox":
        return described(window, dataclasses.replace(element, on=not element.on))
    if form == 1:
        known = {each.name for each in window.elements}
        return described(window, dataclasses.replace(
            element, name=_any(rng, [word for word in documents.WORDS[window.lang] if word not in known])))
    other = _any(rng, [each for each in window.elements if each.box != element.box])
    return described(window, element, coordinates.encode_box(other.box, *window.size))


def _wishes(rng: np.random.Generator, window: Window) -> list[tuple[str, list[dict[str, Any]], bool]]:
    """What may be wanted of a window: (instruction, its actions, whether it is the press that ends a dialogue)."""
    says, words, wishes = SAYS[window.lang], NAMES[window.lang], []
    for element in window.elements:
        x, y = _written(window, element)
        click = {"name": "click", "arguments": {"x": x, "y": y}}
        if element.kind == "button":
            wishes.append((says["press"].format(element.name), [click], True))
        elif element.kind == "checkbox":
            wishes.append((says["tick"].format(element.name, words["off" if element.on else "on"]), [click], False))
        elif element.kind == "field":
            text = str(int(rng.integers(10, 1000)))
            letters = {"name": "type", "arguments": {"text": text}}
            wishes.append((says["write"].format(text, element.name), [click, letters], False))
    return wishes


def act(window: Window, action: dict[str, Any]) -> Window:
    """The window after a tool call."""
    given = action["arguments"]
    if action["name"] == "type":
        return window.type(given["text"])
    return window.click(*coordinates.decode_point((given["x"], given["y"]), *window.size))


def _written(window: Window, element: Element) -> tuple[int, int]:
    return coordinates.encode_point(element.centre, *window.size)


T = TypeVar("T")


def _any(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _png(window: Window) -> Media:
    file = io.BytesIO()
    image: Image.Image = page.draw(window)
    image.save(file, "PNG", compress_level=1)
    return Media("image", file.getvalue())


def _asked(window: Window, question: str, answer: str) -> Record:
    messages = (_user(question), {"role": "assistant", "content": [{"type": "text", "text": answer}], "weight": 1.0,
                                  "tool_calls": []})  # fmt: skip
    return Record("", "gui", messages=messages, media=(_png(window),))


def _conversation(seen: list[tuple[Window, str]], calls: list[list[dict[str, Any]]], closing: str) -> Record:
    """The first window with the instruction, then for each call what the assistant does and the window after it."""
    messages = [_user(seen[0][1])]
    for n, some in enumerate(calls):
        messages.append({"role": "assistant", "content": [], "weight": 1.0, "tool_calls": some})
        if n + 1 < len(seen):
            messages.append({"role": "tool", "content": [{"type": "image"}]})
    if closing:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": closing}], "weight": 1.0,
                         "tool_calls": []})  # fmt: skip
    return Record("", "gui", messages=tuple(messages), media=tuple(_png(window) for window, _ in seen), tools=TOOLS)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


KINDS: dict[str, Callable[[np.random.Generator, str], Record]] = {
    "perceive": perceive, "ground": ground, "step": step, "trajectory": trajectory, "critic": critic,
}  # fmt: skip


class Windows:
    """Endless random access to the records of one kind: item i depends on (seed, split, kind, i) alone.

    split: "train" or "heldout", of other colours, faces and seeds. UserError: an unknown kind or split.
    """

    def __init__(self, kind: str, split: str, seed: int = 0):
        if kind not in KINDS or split not in ("train", "heldout"):
            raise UserError(f"data.gui.{kind} ({split}) does not exist; use {', '.join(KINDS)}")
        self.kind, self.split, self.seed = kind, split, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Record:
        made = KINDS[self.kind](generator(self.seed, self.split, "gui", self.kind, i), self.split)
        return dataclasses.replace(made, id=f"gui_{self.kind}/{self.split}/{i}")
