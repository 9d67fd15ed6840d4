"""How stage 5 has answers graded: by the tasks' rules in this process or, with cfg.rewards, by a reward system of the
run's own (`rl.rewards.config`), whose workers and judges are there from the first batch on until the data are closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from glmv_jax.rl.pipeline.local import Rows, rule_grader, system_grader
from glmv_jax.rl.rewards.grade import FAILURES, Grade

if TYPE_CHECKING:
    from glmv_jax.data.records import Sample
    from glmv_jax.rl.pipeline.protocols import GradeAnswer
    from glmv_jax.rl.rewards.system import RewardSystem
    from glmv_jax.train.stages.rl import RL


class Grading:
    """Of one stage. system: the reward system while it is open.   UserError for a table that makes no sense."""

    def __init__(self, stage: RL) -> None:
        self._stage, self._table = stage, None
        self.system: RewardSystem | None = None
        self._told: dict[str, dict[str, float]] = {}
        if stage.cfg.get("rewards"):
            from glmv_jax.rl.rewards import config  # graders are imported where there are some, not with the trainer

            self._table = config.of_run(stage.cfg.rewards, stage.names)
            config.read(self._table)  # what is wrong is said now, before weights are read and workers start

    def open(self) -> None:
        """Starts the reward system, if there is to be one. UserError for a judge that cannot be used."""
        if self._table is None or self.system is not None:
            return
        from glmv_jax.rl.rewards.system import RewardSystem

        self.system, self._told = RewardSystem(self._table), {}
        try:
            self.system.check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends its processes and connections; what is being graded is cancelled."""
        system, self.system = self.system, None
        if system is not None:
            system.close()

    def score(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Grade]:
        """The grades of a batch; answers to one sample stand together."""
        if self.system is not None:
            return self.system.score(samples, answers)
        from glmv_jax.rl.rewards import score

        return score(samples, answers, self._stage.verifiers)

    def answers(self, rows: Rows) -> GradeAnswer:
        """What grades in the asynchronous form."""
        if self.system is not None:
            return system_grader(rows, self.system, self._stage.cfg.rollout.group)
        return rule_grader(rows, self._stage.verifiers)

    def metrics(self) -> dict[str, float]:
        """What the reward system has counted since the last call, "grading/<what>/<source>": see
        `RewardSystem.counters`. Nothing without one."""
        now = {} if self.system is None else self.system.counters()
        found = {}
        for source, counts in now.items():
            told, always = self._told.get(source, {}), () if source.startswith("judge ") else ("graded", *FAILURES)
            for what in dict.fromkeys((*always, *counts)):
                found[f"grading/{what}/{source}"] = float(counts.get(what, 0.0) - told.get(what, 0.0))
        self._told = now
        return found


class Closing:
    """A data iterator that ends more than itself when it is closed."""

    def __init__(self, data: Any, *ends: Callable[[], None]) -> None:
        self._data, self._ends = data, ends

    def __next__(self) -> Any:
        return next(self._data)

    def get_state(self) -> dict[str, Any]:
        return self._data.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._data.set_state(state)

    def close(self) -> None:
        try:
            self._data.close()
        finally:
            for end in self._ends:
                end()
