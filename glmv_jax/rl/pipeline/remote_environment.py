"""Environment workers: environments in processes of their own (`workers`); `Environments` is the role there,
`RemoteEnvironment` an environment here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import Callable

from glmv_jax.rl.gym import Action, Environment, Observation, Step
from glmv_jax.rl.integrity import sealed
from glmv_jax.rl.pipeline.workers import WorkerLost, Workers


class Environments:
    """The role of an environment worker: holds environments by a name of its own.   make: source -> an environment.

    The images of every observation get hashes here (`integrity.sealed`), which whoever writes them into a conversation
    looks at: what came otherwise than it was made is not played on, let alone trained on.
    """

    def __init__(self, make: Callable[[str], Environment]) -> None:
        self._make = make
        self._open: dict[str, Environment] = {}

    def reset(self, source: str, seed: int, name: str = "") -> tuple[str, Observation]:
        """Begins an episode in the environment of that name, or in a new one if there is none: its name, and the first
        observation."""
        if name not in self._open:
            name = secrets.token_hex(8)  # no other process has one of the same name
            self._open[name] = self._make(source)
        return name, sealed(self._open[name].reset(seed))

    async def step(self, name: str, action: Action) -> Step:
        """LookupError where there is no such environment."""
        if name not in self._open:
            raise LookupError("the process that this episode was in is gone")
        step = await self._open[name].step(action)
        return dataclasses.replace(step, observation=sealed(step.observation))

    def close(self, name: str) -> None:
        if (environment := self._open.pop(name, None)) is not None:
            environment.close()

    def end(self) -> None:
        """Closes all of them."""
        for name in list(self._open):
            self.close(name)


class RemoteEnvironment:
    """An `Environment` in one of the workers, whose role is `Environments`. What it held is gone with its process: the
    next step raises then, the episode has failed, and the pipeline plays it again in another.

    loop: that the workers are used in, where others call `reset` and `close` from threads.   made_by: what the role
    makes it by, if that is not its source.
    """

    def __init__(self, workers: Workers, source: str, loop: asyncio.AbstractEventLoop, made_by: str = "") -> None:
        self._workers, self.source, self._loop = workers, source, loop
        self._made_by = made_by or source
        self._at, self._name = -1, ""

    def reset(self, seed: int) -> Observation:
        return asyncio.run_coroutine_threadsafe(self._reset(seed), self._loop).result()

    async def step(self, action: Action) -> Step:
        return await self._workers.call_once(self._at, "step", self._name, action)

    def close(self) -> None:
        """Begins it; nobody waits for a window to close."""
        at, self._at = self._at, -1
        if at >= 0:
            asyncio.run_coroutine_threadsafe(self._close(at, self._name), self._loop)

    async def _reset(self, seed: int) -> Observation:
        if self._at < 0:
            self._at, self._name = self._workers.least_busy(), ""
        found = await self._workers.call_once(self._at, "reset", self._made_by, seed, self._name)
        self._name, observation = found
        return observation

    async def _close(self, at: int, name: str) -> None:
        with contextlib.suppress(WorkerLost):
            await self._workers.call_once(at, "close", name)
