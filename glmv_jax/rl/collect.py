"""Groups of episodes as graded records: so many environments at work at a time, each episode graded as it ends.

An episode that its environment spoilt says nothing about the policy: it is played once more, in an environment that
begins anew, and left out of its group when that fails too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from glmv_jax.rl.episodes import record
from glmv_jax.rl.gym import Environment
from glmv_jax.rl.play import DEFAULT, Episode, Limits, Policy, play
from glmv_jax.rl.rewards.grade import Grade
from glmv_jax.rl.rollout import Rollout
from glmv_jax.rl.transcript import Form


class Collected(NamedTuple):
    """records: groups together, in the order of the seeds. failed: every episode that an environment spoilt, those
    that were played again too. silent: episodes that were over before the model said anything."""

    records: list[Rollout]
    failed: list[Episode]
    silent: list[Episode]


async def collect(
    make: Callable[[], Environment],
    policy: Callable[[int, int], Policy],
    grade: Callable[[Episode], Awaitable[Grade]],
    seeds: Sequence[int],
    form: Form,
    *,
    group: int,
    parallel: int = 8,
    tries: int = 2,
    limits: Limits = DEFAULT,
) -> Collected:
    """Plays every seed `group` times.

    make: an environment; `parallel` of them are made at most, and closed at the end.
    policy: of (seed, number in the group).
    grade: of an episode; `RewardSystem.grade` is one, so is `episodes.verdict` in a coroutine. It may raise only what
        should end everything.
    tries: how often an episode is played at most.
    """
    free: asyncio.Queue[Environment] = asyncio.Queue()
    environments = [make() for _ in range(min(parallel, len(seeds) * group))]
    for environment in environments:
        free.put_nowait(environment)
    failed: list[Episode] = []

    async def one(row: int, member: int) -> tuple[int, Episode, Grade | None]:
        episode = await played(seeds[row], member)
        graded = episode.transcript.turns and not episode.failed
        return row, episode, (await grade(episode)) if graded else None

    async def played(seed: int, member: int) -> Episode:
        for _ in range(tries):
            environment = await free.get()
            try:
                episode = await play(environment, policy(seed, member), seed, form, limits)
            finally:
                free.put_nowait(environment)
            if not episode.failed:
                break
            failed.append(episode)
        return episode

    try:
        async with asyncio.TaskGroup() as tasks:
            places = [(row, member) for row in range(len(seeds)) for member in range(group)]
            playing = [tasks.create_task(one(*place)) for place in places]
    finally:
        for environment in environments:
            await asyncio.to_thread(environment.close)
    done = [task.result() for task in playing]
    records = [record(episode, grade, row) for row, episode, grade in done if grade is not None]
    silent = [episode for _, episode, _ in done if not episode.failed and not episode.transcript.turns]
    return Collected(records, failed, silent)
