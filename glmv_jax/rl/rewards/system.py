"""The reward system: grades episodes as they end, whatever their data source needs for it, apart from the trainer.

Rules run in processes (`pool`), judges are asked over HTTP (`judge`), `combine` makes one grade of what they say, and
`groups` compares the answers of a group. All waiting is done in one thread with a loop of its own, so that `grade` may
be awaited in any loop, and `score` called from none. A verifier that raises, hangs or talks nonsense is data: that
answer gets the lowest reward and the flag "error", "timeout" or "nan", and the run goes on.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from glmv_jax.config import nearest
from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import config, groups, judge, rules
from glmv_jax.rl.rewards.combine import Part
from glmv_jax.rl.rewards.grade import FAILURES, Answered, Gradable, Grade, failure
from glmv_jax.rl.rewards.pool import Pool, RuleError
from glmv_jax.rl.rewards.style import style
from glmv_jax.rl.rewards.worker import Spec
from glmv_jax.typing import UserError

log = logging.getLogger(__name__)


class RewardSystem:
    """Grades answers by the configuration of their data source, see `config`. Use it in a `with`, or call `close`.

    Raises UserError for a configuration that makes no sense. It is of one process; any thread may use it.
    """

    def __init__(self, cfg: Mapping[str, Any]):
        table, endpoints, self._sources = config.read(cfg)
        self._limit = float(table["limit"])
        self._specs: list[Spec] = []
        self._counts: dict[str, dict[str, float]] = {name: collections.defaultdict(int) for name in self._sources}
        self._clients = {name: judge.Client(endpoint) for name, endpoint in endpoints.items()}
        self._parts = {
            name: {key: self._part(kind, options) for key, (kind, options) in source.parts.items()}
            for name, source in self._sources.items()
        }
        self._groups = {name: self._group(*source.group) for name, source in self._sources.items() if source.group}
        memory = int(table["memory_gb"] * 2**30) if table["memory_gb"] else None
        self._pool = Pool(self._specs, workers=table["workers"], memory=memory) if self._specs else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    # --- what is asked of it ------------------------------------------------------------------------------------------

    async def grade(self, answered: Gradable) -> Grade:
        """The grade of one answer or episode, as soon as its parts are there.

        Of a source with a group-level reward this is what the parts say; `grade_group` completes it.
        """
        return await asyncio.wrap_future(self._start(self._grade(answered)))

    async def grade_group(self, answered: Sequence[Gradable], grades: Sequence[Grade] | None = None) -> list[Grade]:
        """The grades of all answers to one sample; grades: those of `grade`, where they are there already."""
        return await asyncio.wrap_future(self._start(self._grade_group(answered, grades)))

    def score(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Grade]:
        """The grades of a batch, one an answer; answers to one sample stand together and are a group."""
        if len(samples) != len(answers):
            raise ValueError(f"{len(samples)} samples but {len(answers)} answers")
        items = [Answered(sample, text) for sample, text in zip(samples, answers)]
        asked = lambda item: (item.source, item.sample.id if item.sample else "")  # noqa: E731
        each = [list(group) for _, group in itertools.groupby(items, asked)]

        async def all_groups() -> list[list[Grade]]:
            return await asyncio.gather(*(self._grade_group(group, None) for group in each))

        return [grade for group in self._start(all_groups()).result() for grade in group]

    def needs_group(self, source: str) -> bool:
        """Whether answers of this data source are graded together."""
        self._known(source)
        return source in self._groups

    def counters(self) -> dict[str, dict[str, float]]:
        """By data source: answers graded, those that failed by FAILURES, and seconds from question to grade, summed.

        And by "judge NAME" the requests, retries, throttled and garbled replies.
        """
        sources = {name: dict(counts) for name, counts in self._counts.items()}
        return sources | {f"judge {name}": {**client.counts} for name, client in self._clients.items()}

    def check(self) -> None:
        """Asks every judge one small question; UserError when one cannot be used. Before a run, not within."""
        for name, client in self._clients.items():
            try:
                self._start(client.ask([{"role": "user", "content": "Say yes."}], str)).result()
            except (judge.JudgeError, TimeoutError) as error:
                raise UserError(f"the judge {name} at {client.endpoint.url} cannot be used: {error}") from None

    def close(self) -> None:
        """Ends the workers and the connections; what is still being graded is cancelled."""
        if self._loop.is_closed():
            return
        if self._pool is not None:
            self._pool.close()
        self._start(self._shut()).result()
        self._start(self._loop.shutdown_default_executor()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> RewardSystem:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- in its own loop ----------------------------------------------------------------------------------------------

    def _start(self, work: Coroutine) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _shut(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    def _known(self, source: str) -> config.SourceConfig:
        if source not in self._sources:
            raise UserError(f"no rewards for data source {source!r}{nearest(source, self._sources)}")
        return self._sources[source]

    async def _grade(self, answered: Gradable) -> Grade:
        source, counts, begin = self._known(answered.source), self._counts[answered.source], time.monotonic()
        if not source.parts:  # all is left to the group
            return Grade(source.combination.lowest, True, {})
        grade = await source.combination.grade(self._parts[answered.source], answered)
        counts["graded"] += 1
        counts["seconds"] += time.monotonic() - begin
        for flag in set(grade.flags).intersection(FAILURES):
            counts[flag] += 1
        return grade

    async def _grade_group(self, answered: Sequence[Gradable], grades: Sequence[Grade] | None) -> list[Grade]:
        if grades is None:
            grades = await asyncio.gather(*(self._grade(a) for a in answered))
        source = answered[0].source
        if source not in self._groups:
            return list(grades)
        begin = time.monotonic()
        try:
            graded = await self._groups[source].grades(answered, grades)
        except Exception as error:
            if isinstance(error, UserError):
                raise
            log.warning("a group of %s failed: %s: %s", source, type(error).__name__, error)
            graded = [failure("error", self._sources[source].combination.lowest) for _ in answered]
            self._counts[source]["error"] += len(graded)
        self._counts[source]["grouped"] += len(graded)
        self._counts[source]["seconds"] += time.monotonic() - begin
        return graded

    # --- parts --------------------------------------------------------------------------------------------------------

    def _part(self, kind: str, options: Mapping[str, Any]) -> Part:
        """A part that never raises but UserError."""
        if kind == "rule":
            spec = rules.spec(options["rule"], options["args"], options["format_weight"])
            part = functools.partial(self._rule, self._called(spec, options["limit"]), options["images"])
        elif kind == "judge":
            client, judging = self._judging(options)
            part = lambda a: judge.grade(client, judging, _asked(a), a.text)  # noqa: E731
        elif kind == "environment":
            part = functools.partial(_environment, **options)
        else:
            part = functools.partial(_style, **options)
        return functools.partial(_survived, part)

    def _called(self, spec: Spec, limit: float | None) -> Callable:
        """An async function that calls a worker's."""
        self._specs.append(spec)
        limit = float(self._limit if limit is None else limit)

        async def call(*args: Any) -> Any:
            assert self._pool is not None  # there is one as soon as a worker is to be called
            return await asyncio.wrap_future(self._pool.submit(spec, *args, limit=limit))

        return call

    def _judging(self, options: Mapping[str, Any]) -> tuple[judge.Client, judge.Judging]:
        options = dict(options)
        return self._clients[options.pop("judge")], judge.Judging(**options)

    def _group(self, options: Mapping[str, Any], kind: str, comparator: Mapping[str, Any]) -> groups.Comparison:
        if kind == "judge":
            compare = functools.partial(groups.judged, *self._judging(comparator))
        else:
            spec = rules.function(comparator["rule"], comparator["args"])
            compare = functools.partial(groups.by_rule, self._called(spec, comparator["limit"]))
        render = None
        if options["render"] is not None:
            render = self._called(rules.function(options["render"], options["render_args"]), options["limit"])
        return groups.Comparison(compare, render, options["form"], options["polish"])

    async def _rule(self, call: Callable, images: bool, answered: Gradable) -> Grade:
        sample = _asked(answered)
        found = await call(answered.text, sample if images else dataclasses.replace(sample, images=()))
        if isinstance(found, Grade):
            return found
        flag, reason = found
        log.warning("a rule of %s failed on sample %s: %s", answered.source, sample.id, reason)
        return failure(flag)


def _asked(answered: Gradable) -> Sample:
    if answered.sample is None:
        raise RuleError(f"an answer of {answered.source} comes without its sample")
    return answered.sample


async def _survived(part: Part, answered: Gradable) -> Grade:
    """The part's grade, or that of a failure."""
    try:
        return await part(answered)
    except UserError:
        raise
    except Exception as error:  # whatever a grader does wrong, the other answers of the step must be trained on
        sample = answered.sample.id if answered.sample else "?"
        log.warning("grading %s, sample %s: %s: %s", answered.source, sample, type(error).__name__, error)
        return failure("timeout" if isinstance(error, TimeoutError) else "error")


async def _environment(answered: Gradable, *, low: float, high: float, passes: float) -> Grade:
    """The environment's own reward, from [low, high] to [0, 1], cut off outside."""
    if answered.reward is None:
        raise RuleError("the environment gave no reward")
    value = (float(answered.reward) - low) / (high - low)
    if not math.isfinite(value):
        return failure("nan")
    value = min(1.0, max(0.0, value))
    return Grade(value, value >= passes, {"environment": value})


async def _style(answered: Gradable, **options: Any) -> Grade:
    return style(answered.text, _asked(answered), **options)
