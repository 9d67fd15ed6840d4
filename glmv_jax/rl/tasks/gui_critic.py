"""Which line of another model's description of a window is wrong, and what is right: "2: button OK [[10,20,300,400]]",
or "0" when all are right, which is so in a quarter of them. A mistake is another name, another state, or the box of
another element (section 4 of the report, Lens 1: critic data). Legible at 96 to 128 pixels.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from glmv_jax.data import coordinates
from glmv_jax.data.gui import described, mistaken, page
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed
from glmv_jax.rl.rewards.grade import RIGHT, WRONG, Rule, Score
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import gui_perceive

LINES = 3
PROMPTS = {
    "en": "Which line is wrong? {} Answer the number: the right line, or 0.",
    "zh": "哪一行错了？{} 回答 编号: 正确的行，或 0。",
}
LINE = 0.4  # of the right number with a wrong correction
_ANSWER = re.compile(r"\s*([0-9])\s*[:：.]?\s*(.*?)\s*", re.DOTALL)


def generate(rng: np.random.Generator, split: str) -> Sample:
    window = page.generate(rng, split)
    chosen = [window.elements[n] for n in sorted(rng.permutation(len(window.elements))[:LINES].tolist())]
    lines, answer = [described(window, element) for element in chosen], "0"
    if rng.random() < 0.75:
        at = int(rng.integers(len(lines)))
        answer, lines[at] = f"{at + 1}: {lines[at]}", mistaken(rng, window, chosen[at])
    told = "".join(f"\n{n}: {line}" for n, line in enumerate(lines, 1)) + "\n"
    prompt = PROMPTS[window.lang].format(told)
    return scene.sample("gui_critic", page.draw(window), prompt, answer, window.lang, "critic", lines=lines)


def corrected(*, threshold: float = 0.5) -> Rule:
    """A rule for the one mistake: LINE for its number, all of 1 when the words of the correction are equal and its box
    has IoU >= threshold with the gold. "0" is right only where nothing is wrong, and then nothing else is."""

    def rule(content: str, sample: Sample) -> Score:
        found = _ANSWER.fullmatch(content)
        gold: Any = _ANSWER.fullmatch(sample.answer)
        if not found or found[1] != gold[1]:
            return WRONG
        if gold[1] == "0":
            return WRONG if found[2] else RIGHT
        said = gui_perceive.parse(found[2])
        true: Any = gui_perceive.parse(gold[2])
        right = said is not None and said[0] == true[0] and coordinates.iou(said[1], true[1]) >= threshold
        return Score(1.0 if right else LINE, right)

    return rule


def hacks(sample: Sample) -> list[str]:
    """Every number alone, all numbers at once, the description said back, the correction without a number."""
    lines = sample.meta["lines"]
    said = [f"{n}: {line}" for n, line in enumerate(lines, 1)]
    wrong = [*map(str, range(5)), *said, "\n".join(said), "1 2 3", "0 1", "0: " + lines[0], sample.answer[3:] or "1"]
    return [text for text in wrong if text != sample.answer]


TASKS = (Task("gui_critic", boxed(corrected()), hacks, make=generate, levels=levels.by_length(2)),)
