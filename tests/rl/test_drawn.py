"""Answers that are drawn: the parts of their reward against definitions, and pages that are better and worse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from glmv_jax.agents import browser
from glmv_jax.data import coordinates
from glmv_jax.rl import tasks
from glmv_jax.rl.rewards import pictures
from glmv_jax.rl.task import box
from glmv_jax.rl.tasks import svg, ui_code

with_browser = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")


def random_picture(rng, colours: int = 4) -> Image.Image:
    palette = rng.integers(0, 256, (colours, 3))
    return Image.fromarray(palette[rng.integers(0, colours, (9, 12))].astype(np.uint8))


def test_no_picture_of_one_colour_is_near_to_anything():
    rng = np.random.default_rng(0)
    for _ in range(20):
        gold = random_picture(rng)
        plain = [Image.new("RGB", gold.size, tuple(c)) for c in (*rng.integers(0, 256, (30, 3)).tolist(), (0, 0, 0))]
        plain.append(Image.new("RGB", gold.size, tuple(np.median(np.asarray(gold), (0, 1)).astype(int).tolist())))
        assert max(pictures.closeness(each, gold) for each in plain) < 1e-2  # a median between two values is rounded
        assert pictures.closeness(gold, gold) == 1.0


def test_nearness_falls_by_the_share_that_is_missing():
    gold = Image.new("RGB", (40, 40), "white")
    for x in (2, 12, 22, 32):
        gold.paste((0, 0, 255), (x, 5, x + 6, 15))
    for missing in range(5):
        found = gold.copy()
        for x in (2, 12, 22, 32)[:missing]:
            found.paste((255, 255, 255), (x, 5, x + 6, 15))
        assert pictures.closeness(found, gold) == pytest.approx(1 - missing / 4)
    with pytest.raises(ValueError, match="one colour"):
        pictures.closeness(gold, Image.new("RGB", gold.size))
    with pytest.raises(ValueError, match="not compared"):
        pictures.closeness(gold, random_picture(np.random.default_rng(0)))


def test_structure_is_that_of_the_best_assignment_where_parts_lie_apart():
    """Jittered parts of a grid: each overlaps its own gold part alone, so the greedy pairs are the best of all."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        gold = [(20 * x, 20 * y, 20 * x + 9, 20 * y + 9) for x, y in itertools.product(range(2), range(2))]
        found = [tuple(np.add(each, rng.integers(-3, 4, 4)).tolist()) for each in gold[: rng.integers(1, 5)]]
        found += [(300, 300, 305, 305)] * int(rng.integers(0, 2))
        rng.shuffle(found)
        padded = [*found, *[(900, 900, 901, 901)] * (len(gold) - len(found))]
        best = max(
            sum(coordinates.iou(a, b) for a, b in zip(order, gold))
            for order in itertools.permutations(padded, len(gold))
        )
        value = pictures.structure(found, gold, lambda each: each, lambda a, b: 1.0)
        assert value == pytest.approx(best / max(len(found), len(gold)))
    assert pictures.structure([], gold, lambda each: each, lambda a, b: 1.0) == 0.0


def test_a_drawing_is_worth_what_it_shows_however_it_is_written():
    task = tasks.get("svg")
    sample = next(s for s in map(task.source("train", 0).__getitem__, range(60)) if s.answer.count("<rect") == 2)
    value = lambda code: task.verifier(box(code), sample).components["score"]  # noqa: E731
    assert task.verifier(box(f"```svg\n{sample.answer}\n```"), sample).correct
    numbers = "".join(c if c.isdigit() else " " for c in sample.answer.split("<rect", 1)[1].split("fill")[0]).split()
    x, y, w, h = map(int, numbers)
    other = f'<path d="M{x} {y}h{w}v{h}h-{w}z"'
    as_path = sample.answer.replace(f'<rect x="{x}" y="{y}" width="{w}" height="{h}"', other, 1)
    assert as_path != sample.answer and value(as_path) == pytest.approx(1.0)
    moved = [value(sample.answer.replace(f'x="{x}"', f'x="{x + by}"', 1)) for by in (0, 1, 3, 12)]
    assert moved == sorted(moved, reverse=True) and moved[0] == 1.0 and moved[1] > 0.8 > moved[3]
    first = sample.answer[: sample.answer.index("/>") + 2] + "</svg>"
    assert 0.2 < value(first) < 0.8
    doubled = task.verifier(box(sample.answer.replace("</svg>", "") + sample.answer.split(">", 1)[1]), sample)
    assert not doubled.correct and doubled.components["score"] < 0.85


@with_browser
def test_pages_are_graded_by_pixels_and_blocks():
    task = tasks.get("ui_code")
    sample = next(s for s in map(task.source("train", 0).__getitem__, range(12)) if "12px sans" in s.answer)
    score = lambda code: task.verifier(box(code), sample).components["score"]  # noqa: E731
    title = sample.answer.split(">")[2].split("<")[0]
    ladder = [
        sample.answer,
        sample.answer.replace(title, title[:-1] + "x"),
        sample.answer.replace("padding:4px", "padding:7px"),
        sample.answer.replace("font:12px sans-serif", "font:20px serif"),
        "<p>" + title,
        "<p></p>",
    ]
    values = [score(code) for code in ladder]
    assert values == sorted(values, reverse=True) and values[0] == 1.0 and values[1] > 0.8 and values[-1] == 0.0
    assert task.verifier(box(f"```html\n{sample.answer}\n```"), sample).correct
    more = sample.answer + '<div style="height:999px"></div>' + "<p>more</p>" * 9  # below what is seen
    assert ui_code.parts(more, sample)[0] == 1.0 and score(more) < 0.6


@with_browser
def test_pages_of_a_group_are_compared_by_what_they_show():
    sample = tasks.get("ui_code").source("heldout", 0)[1]

    class Shown:
        def __init__(self, code):
            self.picture = ui_code.render(box(code), sample)

    gold, empty = Shown(sample.answer), Shown("<p></p>")
    assert gold.picture.tobytes() == sample.images[0].tobytes()
    assert ui_code.nearer(sample, gold, empty) == (1.0, 0.0) and ui_code.nearer(sample, empty, gold) == (0.0, 1.0)
    assert ui_code.render(sample.answer, sample) is None and ui_code.render(box("no page"), sample) is None


def test_a_fence_is_taken_off():
    assert svg.unfenced("```svg\n<svg/>\n```") == "<svg/>" and svg.unfenced("a ``` b") == "a ``` b"
    assert svg.unfenced("```\na") == "```\na"
