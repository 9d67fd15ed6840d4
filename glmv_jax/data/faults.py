"""A broken record is data: it is counted, logged with its id and reason, and skipped; it never ends the run.

The replacement is the next index, so what a run sees depends on the data and the seed alone. Too many faults are a
broken source, and that does end the run, with the last reason. The counts of the quota are per process and start anew
after a resume; the log in the run directory is shared by all processes and attempts.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from glmv_jax.data.seeds import generator
from glmv_jax.typing import UserError

# What no record can cause: these end the run with their traceback.
BUGS = (NameError, AttributeError, AssertionError, ImportError, NotImplementedError, MemoryError)
TRIES = 20
WINDOW, LIMIT = 1000, 0.05  # records that are looked back at, and the share of them that may fail


class LeftOut(Exception):
    """Raised by a transform for a record that is to be left out and is no fault: the next one takes its place."""


class FaultLog:
    """Appends one JSON object a fault to `path`, or to standard error without one.

    Keys: time, source, index (position in the stream, null when unknown), id, reason.
    """

    def __init__(self, path: str | pathlib.Path | None = None):
        self.path = pathlib.Path(path) if path else None

    def add(self, source: str, id_: str, reason: str, index: int | None = None) -> None:
        """Logs one fault."""
        line = json.dumps({"time": round(time.time(), 3), "source": source, "index": index, "id": id_,
                           "reason": reason}, ensure_ascii=False)
        if self.path is None:
            print("skipped a record: " + line, file=sys.stderr)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # one short write: lines of several processes do not mix
            file.write(line + "\n")

    def counts(self) -> dict[str, int]:
        """Faults by source. A record that was read again after a resume counts once."""
        if self.path is None or not self.path.exists():
            return {}
        seen = set()
        for line in self.path.read_text(encoding="utf-8").splitlines():
            fault = json.loads(line)
            seen.add((fault["source"], fault["index"], fault["id"]))
        return dict(collections.Counter(source for source, _, _ in seen))


class Guarded:
    """A source with a transform, in which a record that raises is logged (but for `LeftOut`) and replaced by the next.

    source:    random access; `transform(record, rng) -> item`, rng depending on (seed, name, index) only.
    records: how many the source has, where it has an end: for who looks at it; what is read of it may have none.
    window, limit: UserError when more than `limit` of the last `window` records failed, or TRIES in a row.
    """

    def __init__(self, source: Any, transform: Callable[[Any, np.random.Generator], Any], *, name: str, seed: int,
                 log: FaultLog, records: int | None = None, window: int = WINDOW, limit: float = LIMIT):
        self.source, self.transform, self.name, self.seed, self.log = source, transform, name, seed, log
        self.records = records
        self.limit = limit
        self.faults = 0
        self._last: collections.deque[bool] = collections.deque(maxlen=window)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        reason = ""
        for attempt in range(TRIES):
            index = (i + attempt) % len(self.source)
            record = None
            try:
                record = self.source[index]
                item = self.made_of(record, index)
            except BUGS:
                raise
            except LeftOut as error:
                reason = f"it was left out: {error}"
            except Exception as error:  # noqa: BLE001 - whatever a broken record raises, and it is logged
                reason = f"{type(error).__name__}: {error}"
                self._failed(index, record, reason)
            else:
                self._last.append(False)
                return item
        raise UserError(f"{TRIES} records of source {self.name!r} in a row failed, the last with {reason}; "
                        f"mend the source{self._where()}")

    def made_of(self, record: Any, index: int) -> Any:
        """The item of a record that was read under this index. Raises what a broken one raises."""
        return self.transform(record, generator(self.seed, self.name, index))

    def _failed(self, index: int, record: Any, reason: str) -> None:
        self.faults += 1
        self._last.append(True)
        self.log.add(self.name, self.id(record, index), reason, index)
        if len(self._last) == self._last.maxlen and sum(self._last) > self.limit * len(self._last):
            raise UserError(f"{sum(self._last)} of the last {len(self._last)} records of source {self.name!r} failed, "
                            f"the last with {reason}; mend the source{self._where()}")

    def id(self, record: Any, index: int) -> str:
        """Its own, or else one of source and index."""
        own = getattr(record, "id", None) or (record[0] if isinstance(record, tuple) else f"{self.name}/{index}")
        return str(own)

    def _where(self) -> str:
        return f", the faults are in {self.log.path}" if self.log.path else ""
