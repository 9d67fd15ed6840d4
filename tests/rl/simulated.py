"""A world for the pipeline whose clock jumps: asyncio as it is, but nobody waits, and standing still is an error."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import math
import selectors
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from glmv_jax.rl.pipeline import Completion, Drawn, Pipeline, Prompt, Request, Scheduler, Taken, train
from glmv_jax.rl.rewards import Grade


class Clock(selectors.DefaultSelector):
    """Instead of waiting for `timeout` seconds it is that much later."""

    now = 0.0

    def select(self, timeout=None):
        events = super().select(0)
        if timeout is None and not events:
            raise RuntimeError("everybody waits and nothing will ever happen")
        self.now += 0.0 if events else timeout
        return events


def run(work: Coroutine) -> Any:
    """Runs it in an asyncio loop with such a clock, which begins at 0."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now
    try:
        return loop.run_until_complete(work)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


class Numbers:
    """Prompts 0, 1, 2 ... of a few sources in turn."""

    def __init__(self, sources=("a", "b", "c")):
        self.sources, self.drawn = sources, 0

    def draw(self) -> Prompt:
        self.drawn += 1
        return Prompt(self.drawn - 1, self.drawn - 1, self.sources[(self.drawn - 1) % len(self.sources)])

    def learn(self, groups):
        pass

    def get_state(self):
        return self.drawn

    def set_state(self, state):
        self.drawn = state


def tokens(weights: str, request: Request, begin: int, end: int) -> np.ndarray:
    """Tokens [begin, end) of what a policy with these weights draws: a function of everything they may depend on."""
    facts = weights, request.prompt.uid, request.member, request.attempt
    first = np.uint32(zlib.crc32(repr(facts).encode()))
    return ((first ^ (np.arange(begin, end, dtype=np.uint32) * np.uint32(0x9E3779B1))) >> np.uint32(8)).astype(np.int32)


class Engine:
    """Writes `length(request)` tokens at one a `tick` seconds, in `slots` at a time.

    fate(request): "" for an answer, "length" for one that was cut, "failed" for one that fails half-way, "lost" for one
    that never ends.
    """

    def __init__(self, length: Callable[[Request], int], *, tick=0.001, slots=10**9, fate=lambda request: ""):
        self.length, self.tick, self.slots, self.fate = length, tick, slots, fate
        self.changes: list[tuple[float, int, str]] = [(0.0, 0, "start")]  # since when, version, weights
        self.waiting: collections.deque = collections.deque()
        self.running: dict[int, tuple] = {}
        self.submitted: list[Request] = []
        self.most = 0

    def set_params(self, weights: str, version: int) -> None:
        self.changes.append((asyncio.get_running_loop().time(), version, weights))

    def submit(self, request, on_done):
        self.submitted.append(request)
        self.waiting.append((request, on_done))
        self._start()

    def abort(self, id):
        for entry in list(self.waiting):
            if entry[0].id == id:
                self.waiting.remove(entry)
                entry[1](Completion(entry[0].prefix or self._draw(entry[0], 0.0, 0), "aborted"))
        if id in self.running:
            self._end(id, "aborted")

    def _start(self):
        loop = asyncio.get_running_loop()
        while self.waiting and len(self.running) < self.slots:
            request, on_done = self.waiting.popleft()
            left = self.length(request) - len(request.prefix or ())
            fate = self.fate(request)
            self.running[request.id] = request, on_done, loop.time(), None
            self.most = max(self.most, len(self.running))
            if fate != "lost":
                seconds = self.tick * left * (0.5 if fate == "failed" else 1.0)
                timer = loop.call_later(seconds, self._end, request.id, fate or "stop")
                self.running[request.id] = request, on_done, loop.time(), timer

    def _end(self, id, reason):
        request, on_done, began, timer = self.running.pop(id)
        if timer is not None:
            timer.cancel()
        elapsed = asyncio.get_running_loop().time() - began
        most = self.length(request) - len(request.prefix or ())
        count = most if reason in ("stop", "length") else min(most, int(elapsed / self.tick + 1e-9))
        on_done(Completion(self._draw(request, began, count), reason, {"error": "crash"} if reason == "failed" else {}))
        self._start()

    def _draw(self, request, began, count) -> Drawn:
        ids, versions = [], []
        if request.prefix is not None:
            ids, versions = [request.prefix.tokens], [request.prefix.versions]
        before, done = len(request.prefix or ()), 0
        for (_, version, weights), until in zip(self.changes, [c[0] for c in self.changes[1:]] + [np.inf]):
            end = min(count, max(0, math.ceil((until - began) / self.tick - 1e-6))) if until < np.inf else count
            if end > done:
                ids.append(tokens(weights, request, before + done, before + end))
                versions.append(np.full(end - done, version, np.int32))
                done = end
        if not ids:
            ids = versions = [np.zeros(0, np.int32)]
        ids = np.concatenate(ids)
        return Drawn(ids, np.full(len(ids), -1.0, np.float32), np.concatenate(versions))


def grade_of(completion: Completion) -> Grade:
    reward = reward_of(completion.drawn.tokens.tolist())
    return Grade(reward, reward == 1.0, {"score": reward})


def reward_of(ids: list[int]) -> float:
    """A coin that the tokens throw."""
    return float(hashlib.blake2b(repr(ids).encode()).digest()[0] % 2)


def learnt(weights: str, groups) -> str:
    """The weights after an update: of everything in the batch."""
    facts = [(g.prompt.uid, [(m.answer.drawn.tokens.tolist(), m.grade.reward) for m in g.members]) for g in groups]
    return hashlib.blake2b(repr((weights, facts)).encode(), digest_size=8).hexdigest()


class World:
    """A pipeline of simulated parts, each of which takes the given seconds, and a trainer that remembers."""

    def __init__(self, scheduler: Scheduler, engine: Engine, *, reward=0.0, batch=0.0, push=0.0, update=0.0):
        self.scheduler, self.engine = scheduler, engine
        self.seconds = {"reward": reward, "batch": batch, "push": push, "train": update}
        self.weights = {0: "start"}
        self.trained: list[Taken] = []
        self.times: list[float] = []  # of the end of each update
        self.graded: list[tuple[float, int]] = []

    async def grade(self, request, completion):
        await asyncio.sleep(self.seconds["reward"])
        self.graded.append((asyncio.get_running_loop().time(), request.id))
        return grade_of(completion)

    async def build(self, step, groups):
        await asyncio.sleep(self.seconds["batch"])
        return [g.prompt.uid for g in groups]

    async def push(self, version):
        await asyncio.sleep(self.seconds["push"])
        self.engine.set_params(self.weights[version], version)

    async def update(self, taken: Taken):
        await asyncio.sleep(self.seconds["train"])
        self.weights[taken.step + 1] = learnt(self.weights[taken.step], taken.groups)
        self.trained.append(taken)
        self.times.append(asyncio.get_running_loop().time())

    async def train(self, steps, save=lambda state: None) -> Pipeline:
        pipeline = Pipeline(self.scheduler, self.engine, self.grade, self.build, self.push)
        try:
            await train(pipeline, self.update, steps, save)
        finally:
            await pipeline.close()
        return pipeline

    @property
    def uids(self) -> list[int]:
        return [g.prompt.uid for taken in self.trained for g in taken.groups]


def ages(world: World) -> list[int]:
    """Of every trained token."""
    return [
        taken.step - int(v) for taken in world.trained for g in taken.groups for m in g.members
        for v in m.answer.drawn.versions
    ]  # fmt: skip
