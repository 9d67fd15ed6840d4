"""A question with an exact answer as an environment: one turn, graded by the reward system from its sample."""

from __future__ import annotations

from typing import Any, Protocol

from glmv_jax.data.records import Sample
from glmv_jax.data.seeds import ENDLESS
from glmv_jax.rl.gym import Action, Observation, Step, asked


class Samples(Protocol):
    """Random access, as `Task.source` gives it."""

    def __getitem__(self, i: int, /) -> Sample: ...


class Single:
    """samples: random access to the questions, as `Task.source` gives it; the seed of an episode is the index."""

    def __init__(self, samples: Samples, source: str) -> None:
        self.source = source
        self._samples = samples
        self.sample: Sample | Any = None  # None before `reset`

    def reset(self, seed: int) -> Observation:
        self.sample = self._samples[seed % ENDLESS]
        return asked(self.sample.prompt, self.sample.images)

    async def step(self, action: Action) -> Step:
        return Step(Observation(), True, info={"sample": self.sample})

    def close(self) -> None:
        """Nothing to let go of."""
