"""What is in a window, the first of the four levels of GUI tasks: the element at a point, or all of them, each a line
of its kind, name, state and box. Legible at the 96 to 128 pixels that `data.gui` draws windows at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glmv_jax.data import coordinates
from glmv_jax.data.gui import SAYS, described, page
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, geometry, text
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score
from glmv_jax.rl.task import Task

FORM = {"en": " Kind, name, state [[box]].", "zh": "类型 名称 状态 [[框]]。"}
FOUND = 0.3  # of an element whose box is right and whose words are not


def generate(rng: np.random.Generator, split: str) -> Sample:
    window = page.generate(rng, split)
    says, asked = SAYS[window.lang], window.elements
    if rng.random() < 0.5:
        asked = (scene.choose(rng, window.elements),)
        point = coordinates.encode_point(asked[0].centre, *window.size)
        prompt = says["point"].format(coordinates.format_lists([point]))
    else:
        prompt = says["all"]
    answer = "\n".join(described(window, element) for element in asked)
    whole = "\n".join(described(window, element) for element in window.elements)
    made = prompt + FORM[window.lang]
    return scene.sample("gui_perceive", page.draw(window), made, answer, window.lang, "elements", all=whole)


def parse(line: str) -> tuple[str, coordinates.Box] | None:
    """(words, box) of a line that ends in one box, else None."""
    words, bracket, rest = line.partition("[")
    boxes = coordinates.parse_boxes(bracket + rest)
    whole = len(boxes) == 1 and words.strip() and rest.rstrip().endswith("]")
    return (text.normalise(words), boxes[0]) if whole else None


def elements(*, threshold: float = 0.5) -> Rule:
    """A rule for lists of elements, each paired with at most one gold element by IoU >= threshold.

    A pair earns FOUND, and 1 when its words are equal too. Their sum over the larger number of elements, times the
    share that is paired, so that what is said twice or missing costs more than its part. A line that is none is wrong.
    """

    def rule(content: str, sample: Sample) -> Score:
        lines = [line for line in content.splitlines() if line.strip()]
        golds: list[Any] = [parse(line) for line in sample.answer.splitlines()]
        found: list[Any] = [each for each in map(parse, lines) if each]
        if not found or len(lines) > geometry.MAX_SHAPES:
            return WRONG
        iou_NM = coordinates.iou_matrix(np.array([box for _, box in found]), np.array([box for _, box in golds]))
        iou_NM[iou_NM < threshold] = 0.0
        pairs = geometry.match(iou_NM)
        count = max(len(lines), len(golds))
        earned = sum(1.0 if found[n][0] == golds[m][0] else FOUND for n, m in pairs)
        value = earned / count * len(pairs) / count
        return Score(value, value == 1.0)

    return rule


def hacks(sample: Sample) -> list[str]:
    """Boxes without words and words without boxes, other words, every line twice, all elements for the one asked."""
    golds: list[Any] = [parse(line) for line in sample.answer.splitlines()]
    lists = [coordinates.format_lists([box]) for _, box in golds]
    wrong = [
        "\n".join(lists),
        "\n".join(words for words, _ in golds),
        "\n".join(f"button x {box}" for box in lists),
        "\n".join(f"{words} [[0,0,999,999]]" for words, _ in golds),
        f"{sample.answer}\n{sample.answer}",
        sample.answer.replace("\n", " "),
    ]
    return [each for each in wrong if each != sample.answer] + (
        [sample.meta["all"]] if len(golds) == 1 and len(sample.meta["all"].splitlines()) > 2 else []
    )


TASKS = (Task("gui_perceive", boxed(elements()), hacks, make=generate, levels=levels.by_count("\n", 1)),)
