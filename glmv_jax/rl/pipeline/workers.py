"""Processes that a role is done in, on any number of machines, as Ray actors. The roles: `remote_rollout`,
`remote_reward`, `remote_environment`.

A role is an object; `make` builds it inside its process, which has the devices that Ray gives it. The pipeline does not
know where its parts are, and a role does not know who asks. A process may die at any time: another takes its place, is
told what all were told (weights), and does the work again.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable
from typing import Any

from glmv_jax.typing import UserError

AT_A_TIME = 100_000  # calls that a process has under way; Ray's own limit would hold weights back behind long answers
LEAVING = 10.0  # seconds that a role has to end what it has begun


class WorkerLost(Exception):
    """The process that did it is gone, and whatever it held."""


class _Actor:
    """What runs in the process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._role = make()

    async def up(self) -> int:
        """The process' number on its machine."""
        return os.getpid()

    async def call(self, method: str, args: tuple) -> Any:
        import ray

        function = getattr(self._role, method)
        args = [await x if isinstance(x, ray.ObjectRef) else x for x in args]
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        return await asyncio.to_thread(function, *args)  # so that it holds up nobody else

    async def end(self) -> None:
        if hasattr(self._role, "end"):
            await asyncio.to_thread(self._role.end)


class Workers:
    """`count` actors of one role. Use it inside one asyncio loop, after `ray.init`; `wait` and `close` from outside.

    needs: what Ray must reserve for each and how it starts them, options of an actor such as {"num_gpus": 1}.
    attempts: how many processes may die over a piece of work before it counts as their murderer.
    name: what lists of processes call them.
    `lost` counts processes that died, `again` the work that was done again.
    UserError where there is no Ray, and for a role that cannot be made.
    """

    def __init__(
        self, make: Callable[[], Any], count: int, *, needs: dict[str, Any] | None = None, attempts: int = 5,
        name: str = "Worker",
    ) -> None:  # fmt: skip
        self._ray, self._attempts, self._name = imported(), attempts, name
        options = {"max_concurrency": AT_A_TIME, **(needs or {"num_cpus": 1}), "max_restarts": 0}
        actor = self._ray.remote(**options)(type(name, (_Actor,), {}))
        self._start = lambda: actor.remote(make)
        self._actors = [self._start() for _ in range(count)]
        self._telling: list[asyncio.Task | None] = [None] * count  # a new process what all have been told
        self._busy = [0] * count
        self._told: dict[str, tuple] = {}
        self.lost = self.again = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._actors)

    def wait(self) -> list[int]:
        """The number of each process on its machine, as soon as all are up."""
        try:
            return self._ray.get([actor.up.remote() for actor in self._actors])
        except self._ray.exceptions.RayActorError as error:
            raise self._unmade(error) from error

    def ready(self, at: int) -> bool:
        """Whether the actor is no new one that is told still what all were told."""
        return self._telling[at] is None

    def least_busy(self) -> int:
        """The number of the actor that has the least to do, of those that are ready if there are any."""
        return min(range(len(self)), key=lambda at: (not self.ready(at), self._busy[at]))

    async def call(
        self, method: str, *args: Any, choose: Callable[[], int] | None = None, again: tuple | None = None
    ) -> Any:
        """What the role's method returns, from whichever process is left in the end.

        choose: whom to ask (again), by default who has the least to do. again: arguments after the first time, where
        they are others. Raises what the method raises, and WorkerLost when `attempts` processes died over it.
        """
        for attempt in range(self._attempts):
            try:
                given = args if again is None or not attempt else again
                return await self.call_once((choose or self.least_busy)(), method, *given)
            except WorkerLost:
                self.again += 1
        raise WorkerLost(f"{self._attempts} processes died over {method}")

    async def call_once(self, at: int, method: str, *args: Any) -> Any:
        """The same of one actor; WorkerLost when its process dies. It is replaced in any case."""
        actor, telling, gone = self._actors[at], self._telling[at], self._ray.exceptions
        self._busy[at] += 1
        try:
            if telling is not None:
                await asyncio.shield(telling)
            return await actor.call.remote(method, args)
        except gone.RayActorError as error:
            self._replace(at, actor, error)
            raise WorkerLost(str(error).splitlines()[0]) from error
        except gone.ObjectLostError as error:  # what it returned was on a machine that is gone
            raise WorkerLost(str(error).splitlines()[0]) from error
        except gone.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        finally:
            self._busy[at] -= 1

    def share(self, value: Any) -> Any:
        """A reference to it, which roles get as the value: it travels once to a machine, not once to a call."""
        return self._ray.put(value)

    async def tell(self, method: str, *args: Any) -> None:
        """Calls it in all of them, and first of all in every process that takes the place of one, for which nobody
        waits here. The last call of a method counts."""
        self._told[method] = args
        there = [at for at, telling in enumerate(self._telling) if telling is None or telling.done()]
        calls = (self.call_once(at, method, *args) for at in there)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, WorkerLost):
                raise result  # those that were lost have been replaced, and are told

    def _replace(self, at: int, dead: Any, error: Exception) -> None:
        """UserError for one that could not be made, as another of its kind could not."""
        if getattr(error, "actor_init_failed", False):
            raise self._unmade(error) from error
        if self._actors[at] is dead and not self._closed:  # many calls may hear of one death
            self.lost += 1
            self._ray.kill(dead)  # where it only cannot be reached
            self._actors[at] = self._start()
            self._telling[at] = asyncio.ensure_future(self._tell_again(at, self._actors[at]))

    async def _tell_again(self, at: int, actor: Any) -> None:
        """What all were told, and what they are meanwhile. What it raises, everybody hears who calls that actor."""
        told: dict[str, tuple] = {}
        try:
            await actor.up.remote()
            while new := [(method, args) for method, args in self._told.items() if told.get(method) is not args]:
                for method, args in new:
                    await actor.call.remote(method, args)
                told |= dict(new)
        except self._ray.exceptions.RayActorError as error:
            self._replace(at, actor, error)
            return
        if self._actors[at] is actor:
            self._telling[at] = None

    def _unmade(self, error: Exception) -> UserError:
        said = [line for line in str(error).splitlines() if line.strip()]
        return UserError(f"a {self._name.lower()} worker cannot be made in a process of its own: {said[-1].strip()}")

    def close(self) -> None:
        """Ends the processes; a role with a method `end` ends first what it has begun."""
        self._closed = True
        self._ray.wait([actor.end.remote() for actor in self._actors], num_returns=len(self), timeout=LEAVING)
        for actor in self._actors:
            self._ray.kill(actor)


def imported() -> Any:
    """Ray. UserError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UserError("workers in processes of their own need Ray: pip install 'glmv_jax[rl]'") from error
    return ray
