"""The pipeline in motion: rollouts, rewards, batches and weights at once in an asyncio loop, which a test may give a
clock of its own.

    prompts -> engine -> (a callback a request) -> reward -> group -> batch -> trainer -> weights -> engine

Whoever trains calls `next` and `publish`; `train` is the plain loop of it. What blocks (a device, a process) is run by
the parts themselves in threads, so that nothing here waits for anything but events.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple

from glmv_jax.rl.pipeline.group import Group
from glmv_jax.rl.pipeline.protocols import Build, Completion, Engine, GradeAnswer, Push, Request
from glmv_jax.rl.pipeline.scheduler import Scheduler
from glmv_jax.rl.pipeline.trace import Trace


class Taken(NamedTuple):
    """A batch for the trainer.   step: its number, the version of the policy that must train on it.
    groups: by uid.   batch: what `build` made of them."""

    step: int
    groups: list[Group]
    batch: Any


class Pipeline:
    """Runs a scheduler. Make it and use it inside one asyncio loop.

    engine, grade, build, push: see `protocols`. trace: gets all spans. Restore the scheduler first to go on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engine: Engine,
        grade: GradeAnswer,
        build: Build,
        push: Push,
        trace: Trace | None = None,
    ) -> None:
        self.scheduler, self.settings = scheduler, scheduler.settings
        self.engine, self.grade, self.build, self.push = engine, grade, build, push
        self._loop = asyncio.get_running_loop()
        self.trace = trace or Trace(self._loop.time)
        self._since: dict[int, float] = {}  # request -> when it was handed over, by the trace's clock
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task] = set()
        self._changed, self._room = asyncio.Event(), asyncio.Semaphore(self.settings.ahead)
        self._batches: asyncio.Queue[Taken] = asyncio.Queue(self.settings.ahead)
        self._failed: asyncio.Future[Taken] = self._loop.create_future()
        self._limited = -1  # the step whose time limit runs
        self._closed = False
        self._spawn(self._make_batches())
        self._move()

    # --- the trainer's side -------------------------------------------------------------------------------------------

    async def next(self) -> Taken:
        """The next batch, as soon as there is one; raises what a part of the pipeline raised."""
        got = asyncio.ensure_future(self._batches.get())
        try:
            await asyncio.wait((got, self._failed), return_when=asyncio.FIRST_COMPLETED)
            taken = self._failed.result() if self._failed.done() else got.result()
        finally:
            got.cancel()
        self.scheduler.taken(taken.step)
        self._room.release()
        self._move()
        return taken

    async def publish(self, version: int) -> None:
        """Hands the engine the weights of a version, while it goes on; for one call at a time, in rising order."""
        with self.trace.span("weights", f"version {version}", version=version):
            await self.push(version)
        self.scheduler.published(version)
        self._move()

    async def close(self) -> None:
        """Ends what runs; it would be asked for again after `Scheduler.restore`."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        for id in self._since:
            self.engine.abort(id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failed.done():
            self._failed.exception()  # was raised by `next`, or nobody asked any more
        else:
            self._failed.cancel()

    # --- what runs by itself ------------------------------------------------------------------------------------------

    def _move(self) -> None:
        """Does what the scheduler says. After every event."""
        if not self._closed:
            self._guarded(self._obey)
            self._changed.set()

    def _obey(self) -> None:
        for id in self.scheduler.stops():
            self._leaves(id, "aborted")
            self.engine.abort(id)
        requests = self.scheduler.begin()
        for request in requests:
            self._since[request.id] = self.trace.clock()
            if self.settings.patience is not None:
                timer = self._loop.call_later(self.settings.patience, self._lost, request.id, "no sign of it")
                self._timers[request.id] = timer
            in_loop: Any = self._loop.call_soon_threadsafe
            self.engine.submit(request, functools.partial(in_loop, self._ended, request))
        if requests and self.settings.seconds is not None and self._limited < self.scheduler.step:
            self._limited = self.scheduler.step
            self._loop.call_later(self.settings.seconds, self._expired, self.scheduler.step)

    def _ended(self, request: Request, completion: Completion) -> None:
        if self._closed:
            return
        self._leaves(request.id, completion.reason)
        if (timer := self._timers.pop(request.id, None)) is not None:
            timer.cancel()  # only now: a request that was told to end may be lost as well
        self._guarded(self._follow, request, completion)
        self._move()

    def _follow(self, request: Request, completion: Completion) -> None:
        if self.scheduler.ended(request.id, completion):
            self._spawn(self._grade(request, completion))

    async def _grade(self, request: Request, completion: Completion) -> None:
        name = f"prompt {request.prompt.uid}.{request.member}"
        try:
            with self.trace.span("reward", name, source=request.prompt.source):
                grade = await self.grade(request, completion)
        except Exception as error:  # a broken grader must not end the run; a prompt whose answers all fail is given up
            self._lost(request.id, f"reward: {type(error).__name__}: {error}")
        else:
            self.scheduler.graded(request.id, grade)
            self._move()

    async def _make_batches(self) -> None:
        while True:
            await self._room.acquire()
            while (picked := self.scheduler.pick()) is None:
                self._move()  # what it found too old may begin anew
                self._changed.clear()
                await self._changed.wait()
            self._move()
            step, groups = picked
            with self.trace.span("batch", f"step {step}", step=step, groups=len(groups)):
                batch = await self.build(step, groups)
            self._batches.put_nowait(Taken(step, groups, batch))

    def _leaves(self, id: int, how: str) -> None:
        if (begin := self._since.pop(id, None)) is not None:
            self.trace.add("rollout", f"request {id}", begin, how=how)

    def _lost(self, id: int, error: str) -> None:
        self._leaves(id, "lost")
        self._guarded(self.scheduler.lost, id, error)
        self._move()

    def _expired(self, step: int) -> None:
        if step == self.scheduler.step:
            self.scheduler.expired = True
            self._changed.set()

    def _guarded(self, function: Callable[..., Any], *args: Any) -> None:
        """Calls it; what it raises ends the run, in `next`."""
        try:
            function(*args)
        except Exception as error:
            self._fail(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)


async def train(
    pipeline: Pipeline,
    update: Callable[[Taken], Awaitable[None]],
    steps: int,
    save: Callable[[Mapping[str, Any]], None] = lambda state: None,
) -> None:
    """The plain loop, until `steps` batches are trained on; the weights of an update travel during the next one.

    update: one step of training.   save: gets the pipeline's state after every update, to be kept with the weights.
    """
    pushing: asyncio.Future[None] | None = None
    try:
        while pipeline.scheduler.trained < steps:
            taken = await pipeline.next()
            with pipeline.trace.span("train", f"step {taken.step}", step=taken.step):
                await update(taken)
            save(pipeline.scheduler.state())
            if pushing is not None:
                await pushing
            pushing = asyncio.ensure_future(pipeline.publish(taken.step + 1))
            if not pipeline.settings.staleness:
                await pushing  # the next batch waits for it in any case; so does whoever saves
        if pushing is not None:
            await pushing
    finally:
        if pushing is not None:
            pushing.cancel()
