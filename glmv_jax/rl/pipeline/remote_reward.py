"""Reward workers: graders in processes of their own (`workers`); the role is `Graders`, and `RemoteGrader` asks it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from glmv_jax.rl.pipeline.local import nothing
from glmv_jax.rl.pipeline.protocols import Completion, GradeAnswer, Request
from glmv_jax.rl.pipeline.together import Answer, Together
from glmv_jax.rl.pipeline.workers import Workers

if TYPE_CHECKING:
    from glmv_jax.rl.rewards.grade import Grade

Counts: TypeAlias = dict[str, dict[str, float]]  # see `RewardSystem.counters`


class Graders:
    """The role of a reward worker.   grade: of an answer.   compare: of all answers of a group.   counters: what has
    been counted so far.   end: of all that it uses."""

    def __init__(
        self, grade: GradeAnswer, compare: Callable[[Sequence[Answer]], Awaitable[Sequence[Grade]]],
        counters: Callable[[], Counts], end: Callable[[], None],
    ) -> None:  # fmt: skip
        self._grade, self._compare, self._counters, self.end = grade, compare, counters, end
        self._told: Counts = {}

    async def grade(self, request: Request, completion: Completion) -> tuple[Grade, Counts]:
        """And what was counted since that was told."""
        return await self._grade(request, completion), self._counted()

    async def compare(self, answers: Sequence[Answer]) -> tuple[Sequence[Grade], Counts]:
        return await self._compare(answers), self._counted()

    def _counted(self) -> Counts:
        told, self._told = self._told, self._counters()
        return {
            source: {what: count - told.get(source, {}).get(what, 0.0) for what, count in counts.items()}
            for source, counts in self._told.items()
        }


class RemoteGrader:
    """Grades in workers whose role is `Graders`.

    compared: sources whose answers are compared, all `size` of a group.   counters: as of the roles, all together; what
    was counted for a verdict that a process took with it is not in them.
    """

    def __init__(self, workers: Workers, compared: Collection[str] = (), size: int = 1) -> None:
        self._workers, self._compared = workers, frozenset(compared)
        self._together = Together(self._compare, size)
        self._counts: dict[tuple[str, str], float] = collections.defaultdict(float)

    async def __call__(self, request: Request, completion: Completion) -> Grade:
        if request.prompt.source in self._compared:
            return await self._together(request, completion)
        grade, counts = await self._workers.call("grade", *_graded_part(request, completion))
        self._count(counts)
        return grade

    async def _compare(self, answers: Sequence[Answer]) -> Sequence[Grade]:
        grades, counts = await self._workers.call("compare", [_graded_part(*answer) for answer in answers])
        self._count(counts)
        return grades

    def _count(self, counts: Counts) -> None:
        for source, more in counts.items():
            for what, count in more.items():
                self._counts[source, what] += count

    def counters(self) -> Counts:
        """From any thread."""
        found: Counts = collections.defaultdict(dict)
        for (source, what), count in list(self._counts.items()):
            found[source][what] = count
        return dict(found)


def _graded_part(request: Request, completion: Completion) -> Answer:
    """What verdicts depend on: no log-probabilities, and of an episode no pixels."""
    episode = completion.episode
    if episode is not None:
        episode = dataclasses.replace(episode, transcript=cast(Any, None))
    slim = dataclasses.replace(completion, drawn=nothing(), episode=episode)
    return dataclasses.replace(request, prefix=None), slim
