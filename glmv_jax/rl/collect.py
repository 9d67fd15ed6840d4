"""Groups of episodes as graded records: so many at a time, each graded as it ends, compared when its group is there.

An episode that its environment spoilt says nothing about the policy: it is played once more, in another environment,
and left out of its group when that fails too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from glmv_jax.rl.arena import Arena
from glmv_jax.rl.episodes import record
from glmv_jax.rl.play import DEFAULT, Episode, Limits, Policy
from glmv_jax.rl.rewards.grade import Grade
from glmv_jax.rl.rollout import Rollout
from glmv_jax.rl.transcript import Form


class Collected(NamedTuple):
    """records: groups together, in the order they were asked for. failed: every episode that an environment spoilt,
    those that were played again too. silent: episodes that were over before the model said anything."""

    records: list[Rollout]
    failed: list[Episode]
    silent: list[Episode]


async def collect(
    arena: Arena,
    policy: Callable[[int, int], Policy],
    grade: Callable[[Episode], Awaitable[Grade]],
    groups: Sequence[tuple[str, int]],
    form: Form,
    *,
    size: int,
    tries: int = 2,
    limits: Limits = DEFAULT,
    compare: Callable[[Sequence[Episode], Sequence[Grade]], Awaitable[Sequence[Grade]]] | None = None,
) -> Collected:
    """Plays every group's episode `size` times.

    policy: of (seed, number in the group).
    grade: of an episode; `RewardSystem.grade` is one, so is `episodes.verdict` in a coroutine. It may raise only what
        should end everything, and so may `compare`.
    groups: (environment's name, seed) of each.
    tries: how often an episode is played at most.
    compare: the grades of a group, of all that is left of it and what `grade` said of each.
    """
    failed: list[Episode] = []
    silent: list[Episode] = []

    async def member(name: str, seed: int, number: int) -> tuple[Episode, Grade] | None:
        for _ in range(tries):
            episode = await arena.play(name, policy(seed, number), seed, form, limits)
            if not episode.failed:
                break
            failed.append(episode)
        else:
            return None
        if not episode.transcript.turns:
            silent.append(episode)
            return None
        return episode, await grade(episode)

    async def whole(row: int, name: str, seed: int) -> list[Rollout]:
        async with asyncio.TaskGroup() as tasks:
            playing = [tasks.create_task(member(name, seed, number)) for number in range(size)]
        found = [result for task in playing if (result := task.result()) is not None]
        grades: Sequence[Grade] = [grade for _, grade in found]
        if compare is not None and found:
            grades = await compare([episode for episode, _ in found], grades)
        return [record(episode, grade, row) for (episode, _), grade in zip(found, grades)]

    async with asyncio.TaskGroup() as tasks:
        playing = [tasks.create_task(whole(row, *group)) for row, group in enumerate(groups)]
    return Collected([record for task in playing for record in task.result()], failed, silent)
