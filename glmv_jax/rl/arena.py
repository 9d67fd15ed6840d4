"""Environments that are kept from episode to episode: a browser starts once, not once an episode.

There are so many at a time, at most, of all names together, at work or waiting. One that waits is reset for the next
episode of its name; where there is none, another is made, for which the one that has waited longest makes room. An
environment in which an episode failed or ran out of time is closed and never seen again: what a thread may still do in
it touches nobody.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable

from glmv_jax.rl.gym import Environment
from glmv_jax.rl.play import DEFAULT, Episode, Limits, Policy, Stopped, closed, play
from glmv_jax.rl.transcript import Form


class Arena:
    """make: of a name, an environment.   size: of them at a time.   Used from one event loop at a time.

    made, gone: by name, how many were made, and how many of those were given up because of what happened in them.
    """

    def __init__(self, make: Callable[[str], Environment], size: int):
        self._make, self._size = make, size
        self._waiting: list[tuple[str, Environment]] = []  # the longest first
        self._there = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.made, self.gone = collections.Counter[str](), collections.Counter[str]()

    async def play(
        self,
        name: str,
        policy: Policy,
        seed: int,
        form: Form,
        limits: Limits = DEFAULT,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Episode:
        """`play.play` in an environment of that name, as soon as there is one. Raises what that raises, and Stopped
        when it is its turn and the episode is not wanted any more."""
        async with self._places():
            if not wanted():
                raise Stopped
            environment, whole = await self._taken(name), False
            try:
                episode = await play(environment, policy, seed, form, limits)
                whole = episode.ended not in ("failed", "time")
                return episode
            except Stopped:  # by the policy, while the environment waited for it
                whole = True
                raise
            finally:
                await self._back(name, environment, whole)

    def close(self) -> None:
        """Closes all of them, none of which may be at work. What is played afterwards is in new ones."""
        while self._waiting:
            self._there -= 1
            self._waiting.pop()[1].close()

    def _places(self) -> asyncio.Semaphore:
        """For as many as may be at work: an event loop has its own, and all of them when it ends."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._semaphore = loop, asyncio.Semaphore(self._size)
        return self._semaphore

    async def _taken(self, name: str) -> Environment:
        """With a place: one that waits, or a new one."""
        for at, (other, environment) in reversed(list(enumerate(self._waiting))):
            if other == name:
                del self._waiting[at]
                return environment
        self._there += 1
        try:
            if self._there > self._size:
                self._there -= 1
                await closed(self._waiting.pop(0)[1])
            environment = await asyncio.to_thread(self._make, name)
        except BaseException:
            self._there -= 1
            raise
        self.made[name] += 1
        return environment

    async def _back(self, name: str, environment: Environment, whole: bool) -> None:
        if whole:
            self._waiting.append((name, environment))
            return
        self._there -= 1
        self.gone[name] += 1
        await closed(environment)
