"""The box of an element that is named, the second of the four levels of GUI tasks. Legible at the 96 to 128 pixels that
`data.gui` draws windows at.
"""

from __future__ import annotations

import numpy as np

from glmv_jax.data import coordinates
from glmv_jax.data.gui import NAMES, SAYS, page
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, geometry
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import visual


def generate(rng: np.random.Generator, split: str) -> Sample:
    window = page.generate(rng, split)
    asked = scene.choose(rng, window.elements)
    boxes = [list(coordinates.encode_box(element.box, *window.size)) for element in window.elements]
    number = window.elements.index(asked)
    facts = {"boxes": [boxes[number]], "others": [box for n, box in enumerate(boxes) if n != number]}
    prompt = SAYS[window.lang]["box"].format(NAMES[window.lang][asked.kind], asked.name)
    answer = coordinates.format_lists([boxes[number]])
    return scene.sample("gui_ground", page.draw(window), prompt, answer, window.lang, "box", **facts)


def hacks(sample: Sample) -> list[str]:
    """Those of grounding, and the boxes of the other elements: each, and all with the right one."""
    others = [coordinates.format_lists([box]) for box in sample.meta["others"]]
    return [*visual.showers(sample), *others, coordinates.format_lists(sample.meta["boxes"] + sample.meta["others"])]


LEVELS = levels.by_number("others", 5, 7)
TASKS = (Task("gui_ground", boxed(geometry.boxes(threshold=0.5, graded=0.5)), hacks, make=generate, levels=LEVELS),)
