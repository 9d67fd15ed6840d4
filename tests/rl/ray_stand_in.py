"""As much of Ray as `rl.pipeline.workers` uses, in one process: an actor is a thread with a loop of its own, whatever
goes to it or comes from it goes through pickle, and it dies when a test says so.

Written from Ray 2.60's documentation; no evidence of what a real cluster does (tests/train/test_rl_ray.py, where Ray is
installed).
"""

from __future__ import annotations

import asyncio
import collections
import pickle
import sys
import threading
import types
from concurrent.futures import Future
from typing import Any

_REFS: dict[int, ObjectRef] = {}


class RayActorError(Exception):
    actor_init_failed = False


class ObjectLostError(Exception): ...


class RayTaskError(Exception):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class ObjectRef:
    def __init__(self) -> None:
        self.future: Future = Future()

    def __await__(self):
        return asyncio.shield(asyncio.wrap_future(self.future)).__await__()  # who waits no more cancels nothing

    def __reduce__(self):
        _REFS[id(self)] = self
        return _ref, (id(self),)


def _ref(key: int) -> ObjectRef:
    return _REFS[key]


class _Method:
    def __init__(self, actor: _Handle, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *args: Any) -> ObjectRef:
        return self._actor.ask(self._name, args)


class _Handle:
    """An actor that was started."""

    def __init__(self, world: StandIn, cls: type, args: tuple) -> None:
        self._world, self._cls = world, cls
        self._open: set[ObjectRef] = set()
        self.dead: RayActorError | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        try:
            self.actor = cls(*args)
        except Exception as error:
            self.dead = RayActorError(f"it died in its creation task\n{type(error).__name__}: {error}")
            self.dead.actor_init_failed = True

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    def ask(self, name: str, args: tuple) -> ObjectRef:
        ref = ObjectRef()
        if name == "call":
            self._world.calls[key := (self._cls.__name__, args[0])] += 1
            if self._world.calls[key] in self._world.deaths.get(key, ()):
                self.die()
        if self.dead is not None:
            ref.future.set_exception(self.dead)
            return ref
        self._open.add(ref)
        asyncio.run_coroutine_threadsafe(self._do(ref, name, pickle.dumps(args)), self._loop)
        return ref

    async def _do(self, ref: ObjectRef, name: str, args: bytes) -> None:
        try:
            found = pickle.dumps(await getattr(self.actor, name)(*pickle.loads(args)))
        except BaseException as error:
            self._answer(ref, RayTaskError(error))
        else:
            self._answer(ref, found)

    def _answer(self, ref: ObjectRef, found: bytes | Exception) -> None:
        if ref not in self._open:
            return  # it died meanwhile
        self._open.discard(ref)
        if isinstance(found, Exception):
            ref.future.set_exception(found)
        else:
            ref.future.set_result(pickle.loads(found))

    def die(self) -> None:
        self.dead = RayActorError("it is gone")
        for ref in list(self._open):
            self._answer(ref, self.dead)


class StandIn(types.ModuleType):
    """The module `ray`.   started: the options of each actor by name.   calls: of methods of roles, over all actors of
    a name.   deaths: at which of them the actor that gets it dies, {("Rollout", "complete"): [3]}."""

    ObjectRef = ObjectRef
    exceptions = types.SimpleNamespace(
        RayActorError=RayActorError, ObjectLostError=ObjectLostError, RayTaskError=RayTaskError
    )

    def __init__(self) -> None:
        super().__init__("ray")
        self.deaths: dict[tuple[str, str], list[int]] = {}
        self.calls: collections.Counter[tuple[str, str]] = collections.Counter()
        self.started: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        self.resources = {"CPU": 64.0}
        self.up: dict[str, Any] | None = None

    def init(self, address: str, **options: Any) -> None:
        self.up = {"address": address, **options}

    def is_initialized(self) -> bool:
        return self.up is not None

    def shutdown(self) -> None:
        self.up = None

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **options: Any):
        def actor_class(cls: type):
            def start(*args: Any) -> _Handle:
                self.started[cls.__name__].append(options)
                return _Handle(self, cls, pickle.loads(pickle.dumps(args)))

            return types.SimpleNamespace(remote=start)

        return actor_class

    def put(self, value: Any) -> ObjectRef:
        ref = ObjectRef()
        ref.future.set_result(pickle.loads(pickle.dumps(value)))
        return ref

    def get(self, refs: list[ObjectRef]) -> list[Any]:
        return [ref.future.result(60) for ref in refs]

    def wait(self, refs: list[ObjectRef], num_returns: int, timeout: float) -> None:
        assert num_returns == len(refs)
        for ref in refs:
            ref.future.exception(timeout)

    def kill(self, actor: _Handle) -> None:
        actor.die()


def installed(patch: Any) -> StandIn:
    """In place of Ray, as long as this pytest.MonkeyPatch lasts."""
    patch.setitem(sys.modules, "ray", world := StandIn())
    return world
