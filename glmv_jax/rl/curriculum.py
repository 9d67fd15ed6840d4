"""Reinforcement learning with curriculum sampling: more of what the policy can do half of the time.

GLM-V report, arXiv 2507.01006, section 5.3: prompts are in tiers of difficulty by their pass rate, first of other
models or people, then of the rollouts themselves; tiers that are too easy or too hard are drawn less; sources keep
their share. Groups whose rewards are all equal teach nothing, so more prompts are asked than a batch needs: e times as
many, e = 1 / (1 - share of such groups), smoothed. Of the complete ones the most balanced are kept.
The report gives no numbers: tiers and w(p) = max(w_min, 4 p (1 - p)) are ours; w is the variance of a 0/1 reward
relative to its largest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.rl.pipeline.group import Group
from glmv_jax.rl.pipeline.protocols import Prompt
from glmv_jax.typing import UserError

# Bounds of the tiers: very hard, hard, medium, easy, very easy.
TIERS = (0.1, 0.4, 0.6, 0.9)


@dataclasses.dataclass(frozen=True)
class Item:
    """What is drawn as one: a prompt of a finite set, or a level of a generator that never repeats itself.

    key: what its source finds it by, JSON-able.   passes: pass rate that is known beforehand, or None: one half.
    """

    key: Any
    source: str
    passes: float | None = None


class Curriculum:
    """Prompts (`pipeline.protocols.Prompts`) drawn by tier.

    shares: source -> share of the prompts, which stays.   w_min: the least weight of a tier.   decay: of the running
    means of pass rates.   A prompt's key is (how often its item was drawn before) * items + item, see `located`.
    Raises: UserError when there are no items, or a source has a share and no items or the other way round.
    """

    def __init__(
        self,
        items: Sequence[Item],
        shares: Mapping[str, float],
        *,
        w_min: float = 0.05,
        decay: float = 0.7,
        seed: int = 0,
    ) -> None:
        if not items or (wrong := {item.source for item in items} ^ set(shares)):
            raise UserError(f"sources with a share and without items, or the other way round: {sorted(wrong)}"
                            if items else "a curriculum needs items; give at least one")  # fmt: skip
        self.items, self.w_min, self.decay, self.seed = items, w_min, decay, seed
        self._sources = list(shares)
        share = np.array([shares[name] for name in self._sources], float)
        self._share = share / share.sum()
        self._of = [np.array([i for i, item in enumerate(items) if item.source == name]) for name in self._sources]
        self._passes = np.array([0.5 if item.passes is None else item.passes for item in items])
        self._times = np.zeros(len(items), int)
        self._drawn = 0

    @property
    def passes(self) -> np.ndarray:
        """[items] pass rates as far as they are known."""
        return self._passes.copy()

    def probabilities(self) -> np.ndarray:
        """[items] with which each is drawn next: share of its source * w(pass rate of its tier), over the source's."""
        found = np.zeros(len(self.items))
        tiers = np.digitize(self._passes, TIERS)
        for share, members in zip(self._share, self._of):
            weight = np.zeros(len(members))
            for tier in set(tiers[members]):
                inside = tiers[members] == tier
                p = self._passes[members][inside].mean()
                weight[inside] = max(self.w_min, 4.0 * p * (1.0 - p))
            found[members] = share * weight / weight.sum()
        return found

    def draw(self) -> Prompt:
        """The next prompt: of its number, the seed and what was learnt."""
        uid, self._drawn = self._drawn, self._drawn + 1
        i = int(np.random.default_rng((self.seed, uid)).choice(len(self.items), p=self.probabilities()))
        times, self._times[i] = int(self._times[i]), self._times[i] + 1
        return Prompt(uid, times * len(self.items) + i, self.items[i].source)

    def located(self, key: int) -> tuple[int, int]:
        """(item, how often it was drawn before) of a prompt's key: random access for a generator."""
        times, item = divmod(key, len(self.items))
        return item, times

    def learn(self, groups: Sequence[Group]) -> None:
        """Pass rates of some complete groups, in order of their uids: the mean of their raw rewards, held in [0, 1]."""
        for group in sorted(groups, key=lambda group: group.prompt.uid):
            self.observe(self.located(group.prompt.key)[0], float(np.clip(group.rewards, 0.0, 1.0).mean()))

    def observe(self, item: int, passes: float) -> None:
        """The pass rate of one group."""
        self._passes[item] += (1.0 - self.decay) * (passes - self._passes[item])

    def get_state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "passes": self._passes.tolist(), "times": self._times.tolist()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        if len(state["passes"]) != len(self.items):
            raise UserError(f"the saved curriculum has {len(state['passes'])} items and this one {len(self.items)}; "
                            "use the prompts it was saved with")  # fmt: skip
        self._drawn = state["drawn"]
        self._passes, self._times = np.array(state["passes"]), np.array(state["times"])


class Expansion:
    """How many times more prompts than a batch holds are asked, the running mean of 1 / (1 - share of useless groups).

    most: it is never more, also when every group was useless.
    """

    def __init__(self, decay: float = 0.9, most: float = 8.0) -> None:
        if not 0 <= decay < 1 <= most:
            raise UserError(f"an expansion with decay={decay} and most={most}: decay is in [0, 1), most at least 1")
        self.decay, self.most, self.ratio = decay, most, 1.0

    def update(self, useless: int, groups: int) -> float:
        """Told of a step's groups, those among them whose rewards were all equal; the new ratio."""
        last = groups / (groups - useless) if useless < groups else self.most
        self.ratio += (1.0 - self.decay) * (min(last, self.most) - self.ratio)
        return self.ratio

    def groups(self, batch: int) -> int:
        """How many to ask for a batch."""
        return math.ceil(batch * self.ratio - 1e-9)


def useful(group: Group) -> bool:
    """Whether the rewards of a complete group differ: `Scheduler.keep` for dynamic sampling (DAPO, section 3.2). They
    are the rewards as graded, before any shaping."""
    return bool(np.ptp(group.rewards) > 0)


def most_balanced(correct_NG: np.ndarray, count: int) -> np.ndarray:
    """Indices, int [count], of the groups in which as many answers are right as wrong, or nearly so; the best first.

    Args: correct_NG: [N, G] bool.
    """
    away_N = np.abs(2 * correct_NG.sum(1) - correct_NG.shape[1])
    return np.argsort(away_N, kind="stable")[:count]


def kept(groups: Sequence[Group], count: int) -> list[int]:
    """Of complete groups those to be trained on, at most `count`, in their order: useful ones, the most balanced first
    where there are more. Where none is useful, the first: a step has to have something."""
    of = [n for n, group in enumerate(groups) if useful(group)] or [0]
    correct_NG = np.array([[member.grade.correct for member in groups[n].members] for n in of])
    return sorted(of[n] for n in most_balanced(correct_NG, count))
