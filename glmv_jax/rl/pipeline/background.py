"""A pipeline in a thread with a loop of its own, as the data iterator of a trainer that is not asyncio."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from glmv_jax.rl.pipeline.driver import Pipeline, Taken
from glmv_jax.rl.pipeline.protocols import Build, GradeAnswer
from glmv_jax.rl.pipeline.samples import SampleLog, sample_rows
from glmv_jax.rl.pipeline.scheduler import Scheduler
from glmv_jax.rl.pipeline.trace import Trace


@dataclasses.dataclass
class Parts:
    """What a pipeline is made of. engine: an `Engine` with `set_params(params, version)`, which
    may return a future or a coroutine of the moment when the engine has them, and `close()`.
    scheduler: gets the function that notes take; see `Scheduler`.   close: called when all is over."""

    scheduler: Callable[[Callable[[dict[str, Any]], None]], Scheduler]
    engine: Any
    grade: GradeAnswer
    build: Build
    close: Callable[[], None] = lambda: None


class Background:
    """The trainer's side: `exchange` weights for the next batch; the state is for its checkpoints.

    folder: gets samples.jsonl and trace.json; None: neither is written.   loop: of the pipeline.
    """

    def __init__(self, parts: Parts, folder: Path | None = None) -> None:
        self._parts = parts
        self._folder: Path | Any = folder
        self._notes: list[dict[str, Any]] = []
        self._state: dict[str, Any] | None = None
        self._pipeline: Pipeline | Any = None  # None before the first weights
        self._log: SampleLog | None = None
        self._took: tuple[int, float] | None = None  # the batch that is trained on, and since when
        self._params: Any = None
        self.trace = Trace(time.monotonic, keep=20_000)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="pipeline", daemon=True)
        self._thread.start()

    def exchange(self, params: Any, version: int) -> tuple[Taken, list[dict[str, Any]]]:
        """Hands the engine the weights after `version` updates (they are kept), and waits for the batch to train them
        on: that, and the rows of what was sampled for it and what befell other answers meanwhile, for `keep`."""
        if self._took is not None:
            step, since = self._took
            self.trace.add("train", f"step {step}", since, step=step)
        self._params = params
        taken = self._run(self._exchange(version))
        self._took = taken.step, time.monotonic()
        rows, self._notes = [*sample_rows(taken.groups), *self._notes], []
        return taken, rows

    def keep(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes rows, before the next state is asked for."""
        if self._log is not None:
            self._log.write(rows)

    def get_state(self) -> dict[str, Any]:
        """Between two steps: what was taken counts as trained."""
        if self._pipeline is None:
            return self._state or {}
        if self._folder is not None:
            self.trace.save(self._folder / "trace.json")
        return {"scheduler": self._run(self._saved()), "samples": self._log.get_state() if self._log else None}

    def set_state(self, state: dict[str, Any]) -> None:
        """Before the first `exchange`."""
        self._state = state or None

    def close(self) -> None:
        if self._pipeline is not None:
            self._run(self._pipeline.close())
        self._parts.engine.close()
        self._parts.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        if self._log is not None:
            self._log.close()
            self.trace.save(self._folder / "trace.json")

    def _run(self, work: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _exchange(self, version: int) -> Taken:
        if self._pipeline is None:
            await self._begin(version)
        else:
            await self._pipeline.publish(version)
        return await self._pipeline.next()

    async def _saved(self) -> dict[str, Any]:
        return self._pipeline.scheduler.state()

    async def _push(self, version: int) -> None:
        if (done := self._parts.engine.set_params(self._params, version)) is not None:
            await (done if inspect.isawaitable(done) else asyncio.wrap_future(done))

    async def _begin(self, version: int) -> None:
        parts, state = self._parts, self._state
        scheduler = parts.scheduler(lambda row: self._notes.append(row))
        if state is not None:
            scheduler.restore(state["scheduler"])
        if scheduler.step != version:
            raise ValueError(f"the weights are of version {version}, the state of the pipeline of {scheduler.step}")
        if self._folder is not None:
            self._log = SampleLog(self._folder / "samples.jsonl", state and state["samples"])
        await self._push(version)
        self._pipeline = Pipeline(scheduler, parts.engine, parts.grade, parts.build, self._push, self.trace)
