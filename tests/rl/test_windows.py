"""Windows: the distance to a goal against a search of all ways, and graders that take any right action and no other."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest

from glmv_jax.data import coordinates
from glmv_jax.data.gui import act, described, goal, page
from glmv_jax.data.seeds import generator
from glmv_jax.rl import tasks
from glmv_jax.rl.rewards import boxed
from glmv_jax.rl.task import box
from glmv_jax.rl.tasks import gui_critic, gui_perceive, gui_step


def done(window: page.Window, aim: goal.Goal) -> bool:
    """The definition: every element as it shall be, and the button pressed."""
    return window.elements == aim.elements and window.pressed == aim.press


def ways(window: page.Window, aim: goal.Goal) -> list[page.Window]:
    """Windows after one action: a click on each element or beside them, or the letters of any field, whole or in part.
    A press ends the dialogue."""
    if window.pressed:
        return []
    after = [window.click(*element.centre) for element in window.elements] + [window.click(0, 0)]
    texts = {element.value for element in aim.elements if element.value}
    return after + [window.type(text) for whole in texts for text in (whole, whole[:1], whole[1:])]


def search(window: page.Window, aim: goal.Goal, depth: int) -> int | None:
    """The fewest actions to the goal by breadth first, None when there are more than `depth`."""
    seen, layer = {window}, [window]
    for steps in range(depth + 1):
        if any(done(each, aim) for each in layer):
            return steps
        layer = [new for each in layer for new in ways(each, aim) if new not in seen and not seen.add(new)]
    return None


def test_the_distance_is_that_of_a_search():
    compared = collections.Counter()
    for i in range(12):
        rng = generator(i, "distance")
        window = page.generate(rng, "train")
        _, aim = goal.draw(rng, window, 1 + i % 2, press=i % 3 > 0)
        for _ in range(3):  # also from windows that random actions led to
            left = goal.remaining(window, aim)
            assert left == search(window, aim, 4) or left is not None and left > 4
            compared[left] += 1
            options = ways(window, aim)
            window = options[int(rng.integers(len(options)))] if options else window
    assert compared[None] > 2 and len(compared) > 4


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_order_of_right_actions_reaches_the_goal_in_as_many_steps(split):
    right = boxed(gui_step.nearer())
    source = tasks.get("gui_trajectory").source(split, 3)
    for i in range(12):
        sample, rng = source[i], np.random.default_rng(i)
        window, aim = goal.window_of(sample.meta["window"]), goal.goal_of(sample.meta["goal"])
        points = [coordinates.encode_point(element.centre, *window.size) for element in window.elements]
        told = [f"click [[{x},{y}]]" for x, y in points]
        told += [f"type {element.value}" for element in aim.elements if element.value]
        for left in range(goal.remaining(window, aim), 0, -1):
            now = dataclasses.replace(sample, meta={**sample.meta, "window": goal.to_facts(window)})
            good = [answer for answer in told if right(box(answer), now).correct]
            assert good and not right(box("done"), now).correct
            window = act(window, gui_step.parse(good[int(rng.integers(len(good)))]))
            assert goal.remaining(window, aim) == left - 1
        assert done(window, aim) and goal.success(window, aim) and goal.action(window, aim) is None
        now = dataclasses.replace(sample, meta={**sample.meta, "window": goal.to_facts(window)})
        assert right(box("done"), now).correct and not any(right(box(answer), now).correct for answer in told)


def test_trajectories_show_the_present_last():
    lengths = set()
    for i in range(30):
        sample = tasks.get("gui_trajectory").source("train", 1)[i]
        lengths.add(len(sample.images))
        assert sample.images[-1].tobytes() == page.draw(goal.window_of(sample.meta["window"])).tobytes()
    assert lengths == {1, 2, 3}


def test_facts_survive_json():
    for name in ("gui_step", "gui_trajectory", "gui_critic", "gui_perceive", "gui_ground"):
        task = tasks.get(name)
        sample = task.source("heldout", 2)[4]
        again = dataclasses.replace(sample, meta=json.loads(json.dumps(sample.meta)))
        assert task.verifier(box(sample.answer), again) == task.verifier(box(sample.answer), sample)
        if "window" in sample.meta:
            window = goal.window_of(sample.meta["window"])
            assert goal.window_of(again.meta["window"]) == window and goal.to_facts(window) == sample.meta["window"]


@pytest.mark.parametrize("content", [
    "click 5,5", "click [[5,5],[6,6]]", "click [[5]]", "type", "type a\nclick [[1,1]]", "do", "", "click [[1,1]] done",
    "click [[1001,1]]", "type " + "9" * 61,
])  # fmt: skip
def test_what_is_no_action(content):
    assert gui_step.parse(content) == ""


def test_a_click_beside_the_element_earns_less_the_farther_it_is():
    sample = next(s for s in map(tasks.get("gui_step").source("train", 0).__getitem__, range(20)) if "cl" in s.answer)
    rule = gui_step.nearer()
    x, y = gui_step.parse(sample.answer)["arguments"].values()
    values = [rule(f"click [[{min(999, x + away)},{y}]]", sample).value for away in (0, 300, 450)]
    assert values[0] == 1.0 and gui_step.NEAR >= values[1] > values[2] >= 0.0


def test_the_critic_names_the_line_that_is_not_so():
    rule, zeros = gui_critic.corrected(), 0
    for i in range(60):
        sample = tasks.get("gui_critic").source("train", 0)[i]
        window = page.generate(generator(0, "train", "gui_critic", i), "train")  # what the generator draws first
        true = {described(window, element) for element in window.elements}
        wrong = [n for n, line in enumerate(sample.meta["lines"], 1) if line not in true]
        number, _, correction = sample.answer.partition(": ")
        assert wrong == ([int(number)] if number != "0" else []) and (not correction or correction in true)
        zeros += number == "0"
        # Its number alone, and its number with the wrong line said back, are worth the same part.
        if wrong:
            said = f"{number}: {sample.meta['lines'][wrong[0] - 1]}"
            assert rule(said, sample) == rule(number, sample) == (gui_critic.LINE, False)
    assert 5 < zeros < 25


def test_elements_are_counted_once_each():
    sample = next(
        s for s in map(tasks.get("gui_perceive").source("train", 0).__getitem__, range(20)) if "\n" in s.answer
    )
    rule, lines = gui_perceive.elements(), sample.answer.splitlines()
    assert rule("\n".join(reversed(lines)), sample) == (1.0, True)
    count = len(lines)
    assert rule("\n".join(lines[1:]), sample).value == pytest.approx(((count - 1) / count) ** 2)
    assert rule(sample.answer + "\n" + sample.answer, sample).value == pytest.approx(0.25)
    assert rule(sample.answer + "\nand more", sample).value == pytest.approx((count / (count + 1)) ** 2)
