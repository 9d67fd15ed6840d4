"""The prompts of a curriculum with their rows: levels of the tasks' generators, drawn by how often they are solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.data.building import DocumentBuilder
from glmv_jax.rl.curriculum import Curriculum, Item, useful
from glmv_jax.rl.pipeline.group import Group
from glmv_jax.rl.pipeline.local import Rows
from glmv_jax.rl.pipeline.protocols import Prompt
from glmv_jax.rl.prompts import level_rows
from glmv_jax.typing import Batch


class Tiers(Rows):
    """`Rows` whose order a curriculum makes; its items are the levels of each task (`rl.levels`).

    weights: task -> share of the prompts, which stays.   w_min, decay: as `Curriculum` has them. Other arguments as of
    `prompts.prompt_rows`. Raises UserError for an unknown task.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        builder: DocumentBuilder,
        *,
        seed: int = 0,
        faults: str | None = None,
        w_min: float = 0.05,
        decay: float = 0.7,
    ) -> None:
        weights = {name: weight for name, weight in weights.items() if weight}
        self._levels = [(name, level) for name in weights for level in _levels(name)]
        self._of_level = [level_rows(*item, builder, seed=seed, faults=faults) for item in self._levels]
        items = [Item([name, level], name) for name, level in self._levels]
        self.curriculum = Curriculum(items, weights, w_min=w_min, decay=decay, seed=seed)
        self._told = np.zeros((len(items), 2), int)  # groups of each item since the last look, and useful ones
        itself: Any = self  # the random access to rows
        super().__init__(itself)

    def __getitem__(self, key: int) -> Batch:
        item, times = self.curriculum.located(key)
        return self._of_level[item][times]

    def draw(self) -> Prompt:
        return self.curriculum.draw()

    def learn(self, groups: Sequence[Group]) -> None:
        self.curriculum.learn(groups)
        for group in groups:
            self._told[self.curriculum.located(group.prompt.key)[0]] += 1, useful(group)

    def metrics(self) -> dict[str, float]:
        """By source and level, "<what>/<source>/<level>": passes, the pass rate as far as it is known; of the groups
        that were learnt from since the last call: asked, how many; useful, the share whose rewards differ."""
        told, self._told = self._told, np.zeros_like(self._told)
        found = {}
        for (name, level), passes, (asked, differ) in zip(self._levels, self.curriculum.passes, told):
            found[f"passes/{name}/{level}"] = float(passes)
            found[f"asked/{name}/{level}"] = float(asked)
            if asked:
                found[f"useful/{name}/{level}"] = float(differ / asked)
        return found

    def get_state(self) -> Any:
        return self.curriculum.get_state()

    def set_state(self, state: Any) -> None:
        self.curriculum.set_state(state)


def _levels(name: str) -> range:
    from glmv_jax.rl import tasks  # with their graders, which the trainer does not import

    return range(tasks.get(name).levels.count)
