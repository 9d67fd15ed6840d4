"""Rollout workers: an engine in each of several processes (`workers`), for the pipeline one engine.

    there, the role   Engines      an `Engine` and its weights
    here              RemoteEngine, an `Engine`; RemoteTurns, an `episodes.Ask`
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import weakref
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

from glmv_jax.data.building import Document
from glmv_jax.inference import requests
from glmv_jax.rl.pipeline.local import nothing
from glmv_jax.rl.pipeline.protocols import Completion, Drawn, OnDone, Request
from glmv_jax.rl.pipeline.workers import WorkerLost, Workers
from glmv_jax.typing import Params

if TYPE_CHECKING:
    from glmv_jax.rl.pipeline.episodes import Ask

GATHERING = 1.0  # seconds that requests of one moment wait for each other, should one be lost on its way

Moment: TypeAlias = tuple[int, int]  # requests made together: the number of that moment, and how many they are


class Engines:
    """The role of a rollout worker.

    engine: with `set_params` as `background.Parts` has it.   place: weights as arrays of the host -> those of the
    devices here.   ask: has a turn of an episode drawn by the same engine.

    Nothing is drawn before the first weights, nor what others have begun with newer weights than are here.
    """

    def __init__(self, engine: Any, place: Callable[[Params], Params], ask: Ask | None = None) -> None:
        self._engine, self._place, self._ask = engine, place, ask
        self._version, self._newer = -1, asyncio.Condition()
        self._moments: dict[int, list[tuple[Request, asyncio.Future[Completion]]]] = {}
        self._turns: dict[int, Any] = {}

    async def set_params(self, params: Params, version: int) -> None:
        """Of all tokens drawn from then on; what runs goes on."""
        done = await asyncio.to_thread(lambda: self._engine.set_params(self._place(params), version))
        if done is not None:
            await asyncio.wrap_future(done)
        async with self._newer:
            self._version = version
            self._newer.notify_all()

    async def complete(self, request: Request, moment: Moment | None = None) -> Completion:
        """The answer. moment: the engine gets requests of one moment at one moment, as some draw them in one call."""
        await self._has(_newest(request.prefix))
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Completion] = loop.create_future()
        if moment is None:
            self._submit(request, done)
            return await done
        name, size = moment
        if name not in self._moments:
            self._moments[name] = []
            loop.call_later(GATHERING, self._hand_over, name)
        self._moments[name].append((request, done))
        if len(self._moments[name]) == size:
            self._hand_over(name)
        return await done

    def _hand_over(self, name: int) -> None:
        for entry in self._moments.pop(name, ()):
            self._submit(*entry)

    def _submit(self, request: Request, done: asyncio.Future[Completion]) -> None:
        tell = done.get_loop().call_soon_threadsafe
        try:
            self._engine.submit(request, lambda completion: tell(_set, done, completion))
        except Exception as error:  # of this request alone
            done.set_exception(error)

    async def abort(self, id: int) -> None:
        self._engine.abort(id)

    async def turn(
        self, name: int, newest: int, request: Request, document: Document, room: int, turn: int,
        begun: requests.Completion | None,
    ) -> requests.Completion:  # fmt: skip
        """A turn, see `episodes.Ask`. name: to abort it by.   newest: version that the conversation was drawn with."""
        assert self._ask is not None
        await self._has(newest)
        self._turns[name] = self._ask(request, document, room, turn, begun)
        try:
            return await self._turns[name].answer()
        finally:
            del self._turns[name]

    async def abort_turn(self, name: int) -> None:
        if name in self._turns:
            self._turns[name].abort()

    async def _has(self, version: int) -> None:
        """Versions never fall along an answer."""
        async with self._newer:
            await self._newer.wait_for(lambda: self._version >= max(version, 0))


def _newest(begun: Drawn | requests.Completion | None) -> int:
    return -1 if begun is None else int(np.max(begun.versions, initial=-1))


def _set(done: asyncio.Future[Completion], completion: Completion) -> None:
    if not done.done():  # nobody waits any more
        done.set_result(completion)


class _Tasks:
    """Work of one event loop that goes on by itself."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed = False

    def begin(self, work: Coroutine) -> asyncio.Task:
        self._loop = asyncio.get_running_loop()
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """From outside of the loop, which goes on: ends all of it."""
        self.closed = True
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()

    async def _end(self) -> None:
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class RemoteEngine:
    """An `Engine` over workers whose role is `Engines`. Answers of a group go to one worker: they share a prompt.
    `close` is called from outside of the loop."""

    def __init__(self, workers: Workers) -> None:
        self._workers, self._tasks = workers, _Tasks()
        self._new: list[tuple[Request, OnDone]] = []
        self._moments = itertools.count()
        self._at: dict[int, int] = {}  # request -> worker
        self._groups: dict[int, list[int]] = {}  # uid -> worker and how many of its requests run
        self._writing: dict[int, asyncio.Task] = {}

    def submit(self, request: Request, on_done: OnDone) -> None:
        if not self._new:  # what is asked for at one moment is sent as such
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._new.append((request, on_done))

    def abort(self, id: int) -> None:
        for entry in self._new:
            if entry[0].id == id:
                self._new.remove(entry)
                return entry[1](_aborted(entry[0]))
        if id not in self._at:
            return None
        if self._workers.ready(self._at[id]):
            self._tasks.begin(self._abort(id))
        else:  # it waits for a process that has not begun
            self._writing[id].cancel()

    async def set_params(self, params: Params, version: int) -> None:
        """Hands the weights over once; each worker fetches them, between two of its steps."""
        share = lambda: self._workers.share(jax.device_get(params))  # noqa: E731
        await self._workers.tell("set_params", await asyncio.to_thread(share), version)

    def close(self) -> None:
        self._tasks.close()

    def _hand_over(self) -> None:
        new, self._new = self._new, []
        sent: dict[int, list[tuple[Request, OnDone]]] = collections.defaultdict(list)
        for request, on_done in new:
            group = self._groups.setdefault(request.prompt.uid, [self._freest(), 0])
            group[1] += 1
            self._at[request.id] = group[0]
            sent[group[0]].append((request, on_done))
        for entries in sent.values():
            moment = next(self._moments), len(entries)
            for request, on_done in entries:
                self._writing[request.id] = self._tasks.begin(self._complete(request, on_done, moment))

    async def _complete(self, request: Request, on_done: OnDone, moment: Moment) -> None:
        group = self._groups[request.prompt.uid]
        asked: list[int] = []

        def choose() -> int:
            if asked and group[0] == asked[-1]:  # it was lost; the group stays together
                group[0] = self._freest()
            self._at[request.id] = group[0]
            asked.append(group[0])
            return group[0]

        try:
            completion = await self._workers.call("complete", request, moment, choose=choose, again=(request,))
        except asyncio.CancelledError:
            if self._tasks.closed:
                raise
            completion = _aborted(request)
        except Exception as error:  # the answer failed, which is data
            completion = Completion(nothing(), "failed", {"error": f"{type(error).__name__}: {error}"})
        del self._at[request.id], self._writing[request.id]
        group[1] -= 1
        if not group[1]:
            del self._groups[request.prompt.uid]
        on_done(completion)

    def _freest(self) -> int:
        """The worker with the fewest requests, those that were handed over at this very moment included, of those that
        are ready if there are any."""
        load = [0] * len(self._workers)
        for at, count in self._groups.values():
            load[at] += count
        return min(range(len(load)), key=lambda at: (not self._workers.ready(at), load[at]))

    async def _abort(self, id: int) -> None:
        with contextlib.suppress(WorkerLost):  # whoever waits for the request hears of it as well
            await self._workers.call_once(self._at[id], "abort", id)


def _aborted(request: Request) -> Completion:
    """Before anything more was drawn."""
    return Completion(request.prefix or nothing(), "aborted")


class RemoteTurns:
    """An `episodes.Ask` over workers whose role is `Engines`. Turns of an episode go to one worker, which has read the
    conversation so far. `close` is called from outside of the loop."""

    def __init__(self, workers: Workers) -> None:
        self._workers, self._tasks, self._names = workers, _Tasks(), itertools.count()
        self._at: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()
        self._newest: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()

    def __call__(
        self, request: Request, document: Document, room: int, turn: int, begun: requests.Completion | None
    ) -> _Turn:
        name, newest = next(self._names), max(self._newest.get(request, -1), _newest(request.prefix), _newest(begun))
        asked = name, newest, request, document, room, turn, begun
        return _Turn(self._tasks.begin(self._drawn(request, asked)), lambda: self._abort(request, name))

    def close(self) -> None:
        self._tasks.close()

    async def _drawn(self, request: Request, asked: tuple) -> requests.Completion:
        lost: list[int] = []

        def choose() -> int:
            if request not in self._at or self._at[request] in lost:
                self._at[request] = self._workers.least_busy()
            lost.append(self._at[request])
            return self._at[request]

        got = await self._workers.call("turn", *asked, choose=choose)
        self._newest[request] = max(self._newest.get(request, -1), _newest(got))
        return got

    def _abort(self, request: Request, name: int) -> None:
        async def abort() -> None:
            with contextlib.suppress(WorkerLost):
                await self._workers.call_once(self._at[request], "abort_turn", name)

        if request in self._at:
            self._tasks.begin(abort())


class _Turn:
    """Of `inference.front.Ticket` what episodes use."""

    def __init__(self, drawing: asyncio.Task[requests.Completion], abort: Callable[[], None]) -> None:
        self._drawing, self.abort = drawing, abort

    async def answer(self) -> requests.Completion:
        try:
            return await asyncio.shield(self._drawing)
        except asyncio.CancelledError:
            self.abort()
            raise
