"""Roles in processes of their own, on any number of machines: rollout, reward and environment workers as Ray actors.

A role is an object; `make` builds it inside its process, which has the devices that Ray gives it. The pipeline does not
know where its parts are: `RemoteEngine` is an `Engine`, `RemoteGrader` grades, `RemoteEnvironment` steps. A process may
die at any time: another takes its place, is told what all were told (weights), and does the work again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from glmv_jax.rl.gym import Action, Environment, Observation, Step
from glmv_jax.rl.integrity import sealed
from glmv_jax.rl.pipeline.protocols import Completion, Drawn, OnDone, Request
from glmv_jax.typing import UserError

if TYPE_CHECKING:
    from glmv_jax.rl.rewards.grade import Grade


class WorkerLost(Exception):
    """The process that did it is gone, and whatever it held."""


class _Actor:
    """What runs in the process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._role = make()

    async def call(self, method: str, args: tuple) -> Any:
        import ray

        function = getattr(self._role, method)
        args = [await x if isinstance(x, ray.ObjectRef) else x for x in args]
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        return await asyncio.to_thread(function, *args)  # so that it holds up nobody else


class Workers:
    """`count` actors of one role. Use it inside one asyncio loop, after `ray.init`.

    needs: what Ray must reserve for each, such as {"num_cpus": 1, "num_gpus": 1}.   attempts: how many processes may
    die over a piece of work before it counts as their murderer.
    `lost` counts processes that died, `again` the work that was done again.
    """

    def __init__(self, make: Callable[[], Any], count: int, *, needs: dict[str, Any] | None = None, attempts: int = 5):
        try:
            import ray
        except ImportError as error:
            raise UserError("workers in processes of their own need Ray: pip install 'glmv_jax[rl]'") from error
        self._ray, self._attempts = ray, attempts
        actor = ray.remote(**(needs or {"num_cpus": 1}), max_restarts=0)(_Actor)
        self._start = lambda: actor.remote(make)
        self._actors = [self._start() for _ in range(count)]
        self._first: list[list] = [[] for _ in range(count)]  # what an actor has been told and may not have done yet
        self._busy = [0] * count
        self._told: dict[str, tuple] = {}
        self.lost = self.again = 0

    def __len__(self) -> int:
        return len(self._actors)

    def least_busy(self) -> int:
        """The number of the actor that has the least to do."""
        return int(np.argmin(self._busy))

    async def call(self, method: str, *args: Any, choose: Callable[[], int] | None = None) -> Any:
        """What the role's method returns, from whichever process is left in the end; choose: whom to ask (again), by
        default who has the least to do.

        Raises what the method raises, and WorkerLost when `attempts` processes died over it.
        """
        for _ in range(self._attempts):
            try:
                return await self.call_once((choose or self.least_busy)(), method, *args)
            except WorkerLost:
                self.again += 1
        raise WorkerLost(f"{self._attempts} processes died over {method}")

    async def call_once(self, at: int, method: str, *args: Any) -> Any:
        """The same of one actor; WorkerLost when its process dies. It is replaced in any case."""
        actor = self._actors[at]
        self._busy[at] += 1
        try:
            for told in self._first[at]:
                await told
            self._first[at] = []
            return await actor.call.remote(method, args)
        except self._ray.exceptions.RayActorError as error:
            self._replace(at, actor)
            raise WorkerLost(str(error).splitlines()[0]) from error
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        finally:
            self._busy[at] -= 1

    def share(self, value: Any) -> Any:
        """A reference to it, which roles get as the value: it travels once to a machine, not once to a call."""
        return self._ray.put(value)

    async def tell(self, method: str, *args: Any) -> None:
        """Calls it in all of them, and first of all in every process that takes the place of one. The last call of a
        method counts."""
        self._told[method] = args
        calls = (self.call_once(at, method, *args) for at in range(len(self)))
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, WorkerLost):
                raise result  # those that were lost have been replaced, and told

    def _replace(self, at: int, dead: Any) -> None:
        if self._actors[at] is dead:  # many calls may hear of one death
            self.lost += 1
            self._actors[at] = self._start()
            self._first[at] = [self._actors[at].call.remote(method, args) for method, args in self._told.items()]

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


class RemoteEngine:
    """An `Engine` over workers whose role has `async complete(request) -> Completion`, `abort(id)` (which makes it
    return what was drawn) and `set_params(params, version)`. Answers of a group go to one worker: they share a prompt.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._at: dict[int, int] = {}  # request -> worker
        self._groups: dict[int, list[int]] = {}  # uid -> worker and how many of its requests run
        self._tasks: set[asyncio.Task] = set()

    def submit(self, request: Request, on_done: OnDone) -> None:
        group = self._groups.setdefault(request.prompt.uid, [self._freest(), 0])
        group[1] += 1
        self._at[request.id] = group[0]
        self._keep(self._complete(request, on_done))

    def abort(self, id: int) -> None:
        if id in self._at:
            self._keep(self._abort(id))

    async def set_params(self, params: Any, version: int) -> None:
        """Hands the weights over once; each worker fetches them, between two of its steps."""
        await self._workers.tell("set_params", self._workers.share(params), version)

    async def _complete(self, request: Request, on_done: OnDone) -> None:
        asked: list[int] = []

        def choose() -> int:
            if asked:
                self._at[request.id] = self._workers.least_busy()
            asked.append(self._at[request.id])
            return asked[-1]

        try:
            completion = await self._workers.call("complete", request, choose=choose)
        except Exception as error:  # the answer failed, which is data
            nothing = Drawn(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))
            completion = Completion(nothing, "failed", {"error": f"{type(error).__name__}: {error}"})
        del self._at[request.id]
        group = self._groups[request.prompt.uid]
        group[1] -= 1
        if not group[1]:
            del self._groups[request.prompt.uid]
        on_done(completion)

    def _freest(self) -> int:
        """The worker with the fewest requests, those that were handed over at this very moment included."""
        load = [0] * len(self._workers)
        for at, count in self._groups.values():
            load[at] += count
        return load.index(min(load))

    async def _abort(self, id: int) -> None:
        with contextlib.suppress(WorkerLost):  # whoever waits for the request hears of it as well
            await self._workers.call_once(self._at[id], "abort", id)

    def _keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class RemoteGrader:
    """Grades in workers whose role has `grade(request, completion) -> Grade`."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def __call__(self, request: Request, completion: Completion) -> Grade:
        return await self._workers.call("grade", request, completion)


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


class RemoteEnvironment:
    """An `Environment` in one of the workers, whose role is `Environments`. What it held is gone with its process: the
    next step raises then, the episode has failed, and the pipeline plays it again in another.

    loop: that the workers are used in, where others call `reset` and `close` from threads.
    """

    def __init__(self, workers: Workers, source: str, loop: asyncio.AbstractEventLoop) -> None:
        self._workers, self.source, self._loop = workers, source, loop
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
        found = await self._workers.call_once(self._at, "reset", self.source, seed, self._name)
        self._name, observation = found
        return observation

    async def _close(self, at: int, name: str) -> None:
        with contextlib.suppress(WorkerLost):
            await self._workers.call_once(at, "close", name)
