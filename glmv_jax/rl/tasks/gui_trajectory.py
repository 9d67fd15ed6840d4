"""The next action towards a goal of several things, the last of the four levels of GUI tasks: the last windows are
seen, and what has been done so far is told; "done" when there is nothing left to do.

Things may be done in any order that does not lengthen the way; a button that ends the dialogue is pressed last. Acting
the whole way is for an environment; `goal.success` judges its last window. Legible at 96 to 128 pixels.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from glmv_jax.data.gui import act, goal, page
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import gui_step

SHOWN = 3  # windows at most: the last one is the present
SO_FAR = {"en": " Done so far: ", "zh": "已完成："}
NOTHING = {"en": "nothing", "zh": "无"}


def generate(rng: np.random.Generator, split: str) -> Sample:
    window = page.generate(rng, split)
    instruction, aim = goal.draw(rng, window, int(rng.integers(1, 3)), True)
    way = goal.play(window, aim)
    windows, actions = [step[0] for step in way], [step[1] for step in way]
    windows.append(act(*way[-1]))
    at = int(rng.integers(len(windows)))
    told = ", ".join(map(gui_step.written, actions[:at])) or NOTHING[window.lang]
    prompt = f"{instruction}{SO_FAR[window.lang]}{told}.{gui_step.FORM[window.lang]}"
    facts = {"window": goal.to_facts(windows[at]), "goal": goal.to_facts(aim)}
    answer = gui_step.written(actions[at] if at < len(actions) else None)
    made = scene.sample("gui_trajectory", page.draw(windows[at]), prompt, answer, window.lang, "action", **facts)
    return dataclasses.replace(made, images=tuple(map(page.draw, windows[max(0, at + 1 - SHOWN) : at + 1])))


LEVELS = levels.by(lambda s: len(s.meta["window"]["elements"]), 7)
TASKS = (Task("gui_trajectory", boxed(gui_step.nearer()), gui_step.hacks, make=generate, levels=LEVELS),)
