"""When each stage of the pipeline worked: a trace that Perfetto and chrome://tracing open, and how much overlapped."""

from __future__ import annotations

import collections
import contextlib
import heapq
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STAGES = ("rollout", "reward", "batch", "weights", "train")
HELD = "reference"  # no work: other policies' weights on the devices, from the start of their copies to their end


class Span(NamedTuple):
    """Work of a stage (or `HELD`) from `begin` to `end`, seconds of the trace's clock; facts: JSON-able."""

    stage: str
    name: str
    begin: float
    end: float
    facts: dict[str, Any]


class Trace:
    """The newest `keep` spans of a run; any thread may use it.

    clock: seconds, by default of `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, keep: int = 200_000) -> None:
        self.clock = clock
        self._spans: collections.deque[Span] = collections.deque(maxlen=keep)
        self._lock = threading.Lock()

    @property
    def spans(self) -> list[Span]:
        """Those there are now, in order of their ends."""
        with self._lock:
            return list(self._spans)

    def add(self, stage: str, name: str, begin: float, end: float | None = None, **facts: Any) -> None:
        """Records work that has ended (now, by default). ValueError for a stage that does not exist."""
        if stage not in (*STAGES, HELD):
            raise ValueError(f"stage {stage!r} is not one of {', '.join((*STAGES, HELD))}")
        with self._lock:
            self._spans.append(Span(stage, name, begin, self.clock() if end is None else end, facts))

    @contextlib.contextmanager
    def span(self, stage: str, name: str, **facts: Any) -> Iterator[None]:
        """The block is work of that stage."""
        begin = self.clock()
        try:
            yield
        finally:
            self.add(stage, name, begin, **facts)

    def seconds(self) -> dict[str, float]:
        """By stage, the time in which it had work under way, however much at once; `HELD` where there is any."""
        spans = self.spans
        busy = lambda stage: sum(e - b for b, e, _ in _levels(s for s in spans if s.stage == stage))  # noqa: E731
        return {stage: busy(stage) for stage in _rows(spans)}

    def overlap(self, stages: Sequence[str] = STAGES) -> float:
        """Of the time in which any of these stages worked, the share in which two or more different ones did. 0 without
        spans."""
        levels = list(_levels(span for span in self.spans if span.stage in stages))
        total = sum(e - b for b, e, _ in levels)
        return sum(e - b for b, e, working in levels if working > 1) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """The trace event format: a process a stage, and in it as many rows as it had spans at once; beside it the
        overlap and the seconds of each stage."""
        spans = self.spans
        zero = min((span.begin for span in spans), default=0.0)
        events: list[dict[str, Any]] = []
        for pid, stage in enumerate(_rows(spans), 1):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": stage}})
            free: list[tuple[float, int]] = []  # (until when it is taken, row)
            for span in sorted((s for s in spans if s.stage == stage), key=lambda s: s.begin):
                row = heapq.heappop(free)[1] if free and free[0][0] <= span.begin else len(free) + 1
                heapq.heappush(free, (span.end, row))
                times = {"ts": 1e6 * (span.begin - zero), "dur": 1e6 * (span.end - span.begin)}
                events.append({"ph": "X", "name": span.name, "cat": stage, "pid": pid, "tid": row, **times,
                               "args": span.facts})  # fmt: skip
        numbers = {
            "overlap": round(self.overlap(), 4),
            **{f"{k}_seconds": round(v, 3) for k, v in self.seconds().items()},
        }
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": numbers}

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_json()), encoding="utf-8")
        os.replace(part, path)


def _rows(spans: Iterable[Span]) -> tuple[str, ...]:
    return (*STAGES, HELD) if any(span.stage == HELD for span in spans) else STAGES


def _levels(spans: Iterable[Span]) -> Iterator[tuple[float, float, int]]:
    """(begin, end, how many different stages work) of every stretch in which any does."""
    edges = sorted(edge for s in spans for edge in ((s.begin, 1, s.stage), (s.end, -1, s.stage)))
    working: collections.Counter[str] = collections.Counter()
    since = 0.0
    for at, change, stage in edges:
        stages = sum(n > 0 for n in working.values())
        if stages and at > since:
            yield since, at, stages
        working[stage] += change
        since = at
