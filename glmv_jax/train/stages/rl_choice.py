"""What a step of stage 5 learns from: advantages of its answers, and which of them are in which update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from glmv_jax.losses import policy
from glmv_jax.rl.rollout import Rollout
from glmv_jax.typing import UserError


class Choice:
    """rollout: the config's group; objective: of the loss.

    Called with records, groups of `size` beside each other: the records of each update, by their place, and the
    advantages [N, G].   Raises: UserError for advantages of parts of grades that are not named.
    """

    def __init__(self, rollout: ConfigDict, objective: policy.Objective) -> None:
        self._r, self._objective = rollout, objective
        if rollout.advantage == "gdpo" and (not rollout.components or rollout.overlong.buffer):
            raise UserError("rollout.advantage=gdpo weighs parts of grades; set rollout.components, such as "
                            "(('score', 1.0), ('format', 0.5)), and rollout.overlong.buffer=0")  # fmt: skip

    def __call__(self, records: Sequence[Rollout], size: int) -> tuple[list[list[int]], np.ndarray]:
        rewards_NG = np.array([x.grade.reward for x in records]).reshape(-1, size)
        advantages_NG = self.advantages(records, rewards_NG)
        return self.minibatches(records, rewards_NG, advantages_NG), advantages_NG

    def minibatches(
        self, records: Sequence[Rollout], rewards_NG: np.ndarray, advantages_NG: np.ndarray
    ) -> list[list[int]]:
        """The rollouts of each update, by their place in `records`.

        Groups whose rewards are all equal have no gradient: packing them would only cost time (DAPO, section 3.2).
        Those whose rewards differ most come first and are not the ones left out when the rows are full. A group goes
        whole to one minibatch, so that rollouts of a prompt share its image in the packed rows.
        """
        r, size = self._r, rewards_NG.shape[1]
        gdpo = r.advantage == "gdpo"
        teaches_N: Any = advantages_NG.any(1) if gdpo else np.asarray(policy.informative(rewards_NG))
        teaches_N = teaches_N | (self._objective.distil.kind != "none")
        teaching = [g for g in np.argsort(-rewards_NG.std(1), kind="stable") if teaches_N[g]]
        dropped = lambda n: r.overlong.drop and records[n].truncated  # noqa: E731
        return [
            [n for g in teaching[i :: r.minibatches] for n in range(g * size, (g + 1) * size) if not dropped(n)]
            for i in range(r.minibatches)
        ]

    def advantages(self, records: Sequence[Rollout], rewards_NG: np.ndarray) -> np.ndarray:
        """[N, G], of rewards from which long answers may lose something."""
        r = self._r
        if r.advantage == "gdpo":
            names, weight_C = zip(*r.components)
            parts = np.array([[x.grade.components.get(name, 0.0) for name in names] for x in records])
            return np.asarray(policy.gdpo_advantages(parts.reshape(*rewards_NG.shape, -1), weight_C))
        if r.overlong.buffer:
            length_NG = np.array([len(x.answer) for x in records]).reshape(rewards_NG.shape)
            lost_NG = policy.overlong(length_NG, r.max_new_tokens, r.overlong.buffer, r.overlong.penalty)
            rewards_NG = rewards_NG + np.asarray(lost_NG)
        return np.asarray(policy.group_advantages(rewards_NG, r.advantage))
