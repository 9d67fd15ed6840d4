"""How stage 5 has answers graded: by the tasks' rules in this process or, with cfg.rewards, by a reward system of the
run's own (`rl.rewards.config`), whose workers and judges are there from the first batch on until the data are closed.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glmv_jax.rl.episodes import verdict
from glmv_jax.rl.pipeline.local import Rows, answered, rule_grader, system_grader
from glmv_jax.rl.pipeline.together import Answer, Together
from glmv_jax.rl.rewards.grade import FAILURES, MIN_REWARD, Grade
from glmv_jax.typing import UserError

if TYPE_CHECKING:
    from glmv_jax.data.records import Sample
    from glmv_jax.rl.pipeline.protocols import Completion, GradeAnswer, Request
    from glmv_jax.rl.pipeline.remote_reward import RemoteGrader
    from glmv_jax.rl.play import Episode
    from glmv_jax.rl.rewards.grade import Verifier
    from glmv_jax.rl.rewards.system import RewardSystem
    from glmv_jax.train.stages.rl import RL


class Grading:
    """Of one stage. system: the reward system while it is open.   remote: who grades in its place, in other processes.
    together: sources whose answers are compared, all of a group.   UserError for a table that makes no sense."""

    def __init__(self, stage: RL) -> None:
        self._stage, self._table = stage, None
        self.system: RewardSystem | Any = None
        self.remote: RemoteGrader | None = None
        self.together: frozenset[str] = frozenset()
        self._told: dict[str, dict[str, float]] = {}
        self._verifiers: dict[str, Verifier] = {}  # of episodes
        self._lowest: dict[str, float] = {}  # of sources whose episodes are compared: what the worst is worth
        parts = stage.episodes.parts if stage.episodes else {}
        if stage.cfg.get("rewards"):
            from glmv_jax.rl.rewards import config  # graders are imported where there are any, not with the trainer

            self._table = config.of_run(stage.cfg.rewards, list(stage.cfg.data.weights), parts)
            _, _, sources = config.read(self._table)  # what is wrong is said now, before workers start
            self.together = frozenset(name for name, source in sources.items() if source.group)
            for name in (name for name in parts if sources[name].group):
                options, kind, comparator = sources[name].group
                self._lowest[name] = _lowest(name, options, kind, comparator, parts[name]["kind"] == "environment")
        elif parts:
            from glmv_jax.rl.rewards import rules

            named = {name: part["rule"] for name, part in parts.items() if part["kind"] == "rule"}
            self._verifiers = {name: rules.verifier(rule) for name, rule in named.items()}

    def open(self, remote: RemoteGrader | None = None) -> None:
        """Starts the reward system, if there is to be one here. UserError for a judge that cannot be used."""
        self.remote, self._told = remote, {}
        if self._table is None or self.system is not None or remote is not None:
            return
        from glmv_jax.rl.rewards.system import RewardSystem

        self.system = RewardSystem(self._table)
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

    async def episode(self, episode: Episode) -> Grade:
        """The grade of an episode. One that met a limit before there was an answer to grade earns nothing."""
        if _unanswered(episode):
            return Grade(MIN_REWARD, False, {}, (episode.ended,))
        if self.system is not None:
            return await self.system.grade(episode)
        if (verifier := self._verifiers.get(episode.source)) is None:
            return verdict(episode)
        from glmv_jax.rl.rewards import score

        sample: Any = episode.sample  # which it has where no environment judges
        return (await asyncio.to_thread(score, [sample], [episode.text], {sample.source: verifier}))[0]

    async def compared(self, episodes: Sequence[Episode], grades: Sequence[Grade]) -> list[Grade]:
        """The grades of a group, or of what is left of it; grades: those of `episode`. Where they are compared, one
        without an answer is worth what an answer is that cannot be rendered."""
        if (worst := self._lowest.get(episodes[0].source)) is None:
            return list(grades)
        found = [dataclasses.replace(grade, reward=worst) for grade in grades]
        answered = [n for n, episode in enumerate(episodes) if not _unanswered(episode)]
        if answered:
            at = [episodes[n] for n in answered], [grades[n] for n in answered]
            for n, grade in zip(answered, await self.system.grade_group(*at)):
                found[n] = grade
        return found

    def answers(self, rows: Rows | None) -> GradeAnswer:
        """What grades in the asynchronous form. rows: of the questions, None where there are none."""
        if self.remote is not None:
            return self.remote
        alone, of_group = self.alone(rows), self.of_group(rows)
        together = Together(of_group, self._stage.cfg.rollout.group)

        async def grade(request: Request, completion: Completion) -> Grade:
            how = together if request.prompt.source in self.together else alone
            return await how(request, completion)

        return grade

    def alone(self, rows: Rows | None) -> GradeAnswer:
        """What grades an answer that is not compared."""
        if self.system is not None:
            questions = system_grader(rows, self.system, self._stage.cfg.rollout.group)
        else:
            questions = rule_grader(rows, self._stage.verifiers)

        async def grade(request: Request, completion: Completion) -> Grade:
            if completion.episode is None:
                return await questions(request, completion)
            return await self.episode(completion.episode)

        return grade

    def of_group(self, rows: Rows | None) -> Callable[[Sequence[Answer]], Awaitable[Sequence[Grade]]]:
        """What grades all answers of a group of `together`."""

        async def grade(answers: Sequence[Answer]) -> Sequence[Grade]:
            if answers[0][1].episode is None:
                return await self.system.grade_group([answered(rows, *answer) for answer in answers])
            episodes = [completion.episode for _, completion in answers]
            return await self.compared(episodes, await asyncio.gather(*map(self.episode, episodes)))

        return grade

    def counters(self) -> dict[str, dict[str, float]]:
        """See `RewardSystem.counters`; nothing without one."""
        counting = self.remote or self.system
        return {} if counting is None else counting.counters()

    def metrics(self) -> dict[str, float]:
        """What the reward system has counted since the last call, "grading/<what>/<source>": see
        `RewardSystem.counters`. Nothing without one."""
        now = self.counters()
        found = {}
        for source, counts in now.items():
            told, always = self._told.get(source, {}), () if source.startswith("judge ") else ("graded", *FAILURES)
            for what in dict.fromkeys((*always, *counts)):
                found[f"grading/{what}/{source}"] = float(counts.get(what, 0.0) - told.get(what, 0.0))
        self._told = now
        return found


def _unanswered(episode: Episode) -> bool:
    """Whether it met a limit before there was anything to grade."""
    return episode.ended != "done" and episode.sample is None and episode.reward is None


def _lowest(name: str, options: Mapping[str, Any], kind: str, comparator: Any, unasked: bool) -> float:
    """Of a source whose episodes are compared. unasked: whether they come without a sample, which not every
    comparison can do without."""
    from glmv_jax.rl.rewards.rvpo import lowest

    if unasked and (kind != "rule" or options["render"] or options["polish"] or options["form"] == "polishing"):
        raise UserError(f"rewards.sources.{name}.group: its episodes have no sample to show to a judge or a renderer; "
                        "compare them by a rule, of None and two `rewards.groups.Candidate`")  # fmt: skip
    return lowest(options["form"])


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
