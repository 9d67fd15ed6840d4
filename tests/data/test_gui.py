"""Drawn windows: boxes against pixels, answers against the tree, trajectories played again from what is written."""

from __future__ import annotations

import collections
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import coordinates, gui
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.gui import page
from glmv_jax.data.local.assembling import Assembler
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.seeds import generator
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError


def windows(kind: str, n: int, split: str = "train") -> list[tuple[page.Window, gui.Record]]:
    """Records with the windows they began with, which are the first thing that their generator draws."""
    source = gui.Windows(kind, split, 3)
    return [(page.generate(generator(3, split, "gui", kind, i), split), source[i]) for i in range(n)]


def said(message: dict) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def pixels(window: page.Window) -> np.ndarray:
    return np.asarray(page.draw(window), int)


def drawn_box(window: page.Window, number: int) -> tuple[int, int, int, int]:
    """Where the picture changes when an element is taken away."""
    without = dataclasses.replace(window, elements=window.elements[:number] + window.elements[number + 1 :])
    y, x = np.nonzero(np.abs(pixels(window) - pixels(without)).sum(-1))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_boxes_are_where_the_pixels_are(split):
    kinds = collections.Counter()
    for i in range(25):
        window = page.generate(np.random.default_rng(i), split)
        covered = np.zeros(window.size[::-1], int)
        for number, element in enumerate(window.elements):
            left, top, right, bottom = element.box
            assert 0 <= left < right <= window.size[0] and page.BAR <= top < bottom <= window.size[1]
            covered[top:bottom, left:right] += 1
            found = drawn_box(window, number)
            assert left <= found[0] and top <= found[1] and found[2] <= right and found[3] <= bottom
            if element.kind in ("field", "button"):
                assert found == element.box
            elif element.kind == "checkbox":
                assert found[2] - found[0] >= 0.75 * (right - left)
            kinds[element.kind] += 1
        assert covered.max() == 1  # no two overlap
    assert all(kinds[kind] >= 25 for kind in page.KINDS)


def test_what_is_perceived_and_ground_is_there():
    for kind in ("perceive", "ground"):
        for window, record in windows(kind, 30):
            asked, answer = said(record.messages[0]), said(record.messages[1])
            boxes = coordinates.parse_boxes(answer)
            real = [coordinates.encode_box(drawn_box(window, n), *window.size) for n in range(len(window.elements))]
            for line, box in zip(answer.splitlines(), boxes, strict=True):
                (best,) = [n for n, each in enumerate(real) if coordinates.iou(each, box) > 0.45]
                assert window.elements[best].name in (line if kind == "perceive" else asked)
            if points := coordinates.parse_points(asked):
                assert coordinates.inside(points[0], boxes[0])
            shown = Image.open(io.BytesIO(record.media[0].content))
            np.testing.assert_array_equal(np.asarray(shown, int), pixels(window))


WISHES = {
    "en": (r"Press (.+)\.", r"Turn (.+) (on|off)\.", r"Write (\d+) into (.+)\."),
    "zh": (r"按(.+)。", r"把(.+)设为(开|关)。", r"在(.+)中输入(\d+)。"),
}


def is_done(window: page.Window, wish: str) -> bool:
    """Whether a window is as an instruction wants it, read from the words alone."""
    press, tick, write = (re.fullmatch(pattern, wish) for pattern in WISHES[window.lang])
    if press:
        return window.pressed == press[1]
    if tick:
        (box,) = [e for e in window.of("checkbox") if e.name == tick[1]]
        return box.on == (tick[2] in ("on", "开"))
    text, name = write.groups() if window.lang == "en" else write.groups()[::-1]
    (field,) = [e for e in window.of("field") if e.name == name]
    return field.value == text


def test_trajectories_reach_their_goal_when_they_are_played_again():
    lengths = collections.Counter()
    for window, record in windows("trajectory", 40):
        between = " Then: " if window.lang == "en" else "然后："
        wishes = said(record.messages[0]).split(between)
        assert len(wishes) >= 2 and not all(is_done(window, wish) for wish in wishes)
        pictures = iter(record.media)
        for message in record.messages:
            if any(part["type"] == "image" for part in message["content"]):
                shown = Image.open(io.BytesIO(next(pictures).content))
                np.testing.assert_array_equal(np.asarray(shown, int), pixels(window))
            for call in message.get("tool_calls", ()):
                lengths[len(record.media) - 1] += 1
                window = gui.act(window, call)
        assert all(is_done(window, wish) for wish in wishes) and next(pictures, None) is None
        assert said(record.messages[-1]) in ("Done.", "完成。")
    assert set(lengths) >= {2, 3, 4}


def test_steps_are_the_next_action_of_their_instruction():
    typed = 0
    for window, record in windows("step", 60):
        wish = said(record.messages[0])
        (call,) = record.messages[1]["tool_calls"]
        if call["name"] == "type":  # the field had been clicked before
            typed += 1
            assert is_done(window, wish) is False and call["arguments"]["text"] in wish
            shown = np.asarray(Image.open(io.BytesIO(record.media[0].content)), int)
            (field,) = [n for n, e in enumerate(window.elements) if e.kind == "field" and e.name in wish][:1]
            focused = gui.act(window, {"name": "click", "arguments": dict(zip("xy", gui._written(
                window, window.elements[field])))})  # fmt: skip
            np.testing.assert_array_equal(shown, pixels(focused))
        else:
            after = gui.act(window, call)
            assert is_done(after, wish) or after.focus >= 0 and window.elements[after.focus].name in wish
    assert 5 < typed < 40


def test_the_critic_knows_the_one_mistake():
    right = 0
    for window, record in windows("critic", 60):
        true = {gui.described(window, element) for element in window.elements}
        claimed = said(record.messages[0]).splitlines()[1:]
        wrong = [line for line in claimed if line not in true]
        answer = said(record.messages[1])
        if not wrong:
            right += 1
            assert answer in ("Right.", "对。")
        else:
            assert len(wrong) == 1
            correction = re.split(r"Wrong: |错：", answer)[1]
            assert correction in true and correction not in claimed
            assert sum(correction.split(" [[")[k] == wrong[0].split(" [[")[k] for k in (0, 1)) == 1  # only one thing
    assert 15 < right < 45


def test_records_are_reproducible_and_splits_differ():
    for kind in gui.KINDS:
        assert gui.Windows(kind, "train", 1)[7] == gui.Windows(kind, "train", 1)[7]
        assert gui.Windows(kind, "train", 1)[7] != gui.Windows(kind, "heldout", 1)[7]
        assert gui.Windows(kind, "train", 1)[7].id == f"gui_{kind}/train/7"
    with pytest.raises(UserError, match="data.gui.look .train. does not exist; use perceive, ground"):
        gui.Windows("look", "train")


def test_they_become_documents():
    tokenizer = Tokenizer()
    assembler = Assembler(DocumentBuilder(tokenizer, Patcher(max_patches=144), 900, 900))
    for kind in gui.KINDS:
        (document,) = assembler.documents(gui.Windows(kind, "train")[0])
        learnt = tokenizer.decode(document.tokens[document.loss_weight > 0], keep_special=True)
        assert ("<tool_call>" in learnt) == (kind in ("step", "trajectory"))
        if kind == "step":
            assert learnt.endswith("</tool_call><|observation|>")
