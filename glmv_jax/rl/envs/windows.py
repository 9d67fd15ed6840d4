"""The drawn windows of `data.gui`, acted in: a goal of two or three things, the last of them a press.

The episode is over with the first press; it has succeeded when the window then is as the goal's own actions leave it:
the button that was pressed, what every field holds, and what is ticked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from glmv_jax.data import gui
from glmv_jax.data.gui import page
from glmv_jax.data.seeds import generator
from glmv_jax.rl.envs.calls import Acting, Refused, Reply, inside
from glmv_jax.rl.gym import Observation, asked

LONGEST = 100  # letters typed at once


class Windows(Acting):
    """split: "train" or "heldout", of other colours, faces and seeds.

    solution: the goal's own actions, for a script.
    """

    source = "windows"
    tools = gui.TOOLS

    def __init__(self, split: str = "train", seed: int = 0):
        self._split, self._seed = split, seed

    def reset(self, seed: int) -> Observation:
        self.window, instruction, self.solution = gui.wanted(
            generator(self._seed, self._split, "gui", "play", seed), self._split
        )
        self.goal = functools.reduce(gui.act, self.solution, self.window)
        return asked(instruction, [page.draw(self.window)], self.tools)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        inside(*(value for value in arguments.values() if isinstance(value, int)))
        letters = arguments.get("text", "")
        if len(letters) > LONGEST or not letters.isprintable():
            raise Refused(f"only up to {LONGEST} letters of one line can be typed")
        self.window = gui.act(self.window, {"name": name, "arguments": arguments})
        pressed = bool(self.window.pressed)
        reached = (self.window.pressed, self.window.elements) == (self.goal.pressed, self.goal.elements)
        return Reply(images=(page.draw(self.window),), done=pressed, reward=float(pressed and reached))
