"""From random access to iterators: worker processes, batches, and a state that is one number.

An item is a function of its index, so where a stream stands is one index, whatever the number of workers: a
checkpoint of a run with four workers resumes in one with none, and batches are the same.

The workers are a standard process pool, not grain's `mp_prefetch`: that one needs absl's command line, takes 25 s to
close when its pipe is full, and leaves its processes behind when the run is killed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from typing import Any, TypeAlias

import grain
import numpy as np

from glmv_jax.typing import UserError

Rows: TypeAlias = dict[str, Any]  # arrays, and numbers of NumPy


class Workers:
    """Processes that make the items of one stream or of several; what those share is in each process once.

    They start with the first stream that is read and end with the last that is closed.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self._items: list[Any] = []
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        self._users = 0

    def add(self, items: Any) -> int:
        """The number under which they make items of this random-access object."""
        self._items.append(items)
        return len(self._items) - 1

    def acquire(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._executor is None:
            self._executor = concurrent.futures.ProcessPoolExecutor(
                self.processes, multiprocessing.get_context("spawn"), _adopt, (self._items,))
        self._users += 1
        return self._executor

    def release(self) -> None:
        """Ends the processes as soon as each has finished the chunk in hand, if no other stream uses them."""
        self._users -= 1
        if not self._users and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


class Stream(grain.IterDataset):
    """Items 0, 1, 2, ... of a random-access object, made in `workers` processes (0: in this one), in order.

    workers: a number, or `Workers` that other streams use too.   chunk: items a worker makes at a time.
    Worker processes are spawned: they import this package (jax only because grain does, never a backend) and get the
    object pickled. State: {"next_index": int}.
    """

    def __init__(self, items: Any, workers: int | Workers = 0, chunk: int = 1):
        super().__init__()
        self.items, self.chunk = items, chunk
        self.workers = workers if isinstance(workers, Workers) else Workers(workers)
        self.number = self.workers.add(items)

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamIterator(self)


class _StreamIterator(grain.DatasetIterator):

    def __init__(self, stream: Stream):
        super().__init__()
        self._stream = stream
        self._next_index = 0
        self._pool: _Pool | None = None

    def __next__(self) -> Any:
        stream = self._stream
        if self._next_index >= len(stream.items):
            raise StopIteration
        if not stream.workers.processes:
            item = stream.items[self._next_index]
        else:
            if self._pool is None:
                self._pool = _Pool(stream, self._next_index)
            item = self._pool.take()
        self._next_index += 1
        return item

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._next_index = int(state["next_index"])

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class _Pool:
    """The items from an index on, made by worker processes a few chunks ahead."""

    def __init__(self, stream: Stream, start: int):
        self._stream, self._start = stream, start
        self._executor = stream.workers.acquire()
        self._chunks: collections.deque[concurrent.futures.Future] = collections.deque()
        self._ready: collections.deque[Any] = collections.deque()
        for _ in range(2 * stream.workers.processes):
            self._ask()

    def _ask(self) -> None:
        stop = min(self._start + self._stream.chunk, len(self._stream.items))
        if stop > self._start:
            self._chunks.append(self._executor.submit(_make, self._stream.number, self._start, stop))
            self._start = stop

    def take(self) -> Any:
        """The next item."""
        if not self._ready:
            try:
                self._ready.extend(self._chunks.popleft().result())
            except concurrent.futures.process.BrokenProcessPool:
                raise UserError("a data worker process died, most often for want of memory; "
                                "use fewer workers and look above for its last words") from None
            self._ask()
        return self._ready.popleft()

    def close(self) -> None:
        for chunk in self._chunks:
            chunk.cancel()
        self._stream.workers.release()


_items: list[Any] = []  # in a worker: what it makes items of


def _adopt(items: list[Any]) -> None:
    """Starts a worker. It ends with the process that started it, also when that one is killed."""
    global _items
    _items = items
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    parent: Any = multiprocessing.parent_process()  # a worker has one

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make(number: int, start: int, stop: int) -> list[Any]:
    return [_items[number][i] for i in range(start, stop)]


class UniqueBatchIterDataset(grain.IterDataset):
    """Batches of rows in which no two rows have the same `key`; a row that would repeat one is dropped.

    Rows repeat only where an epoch ends inside a batch, so few are lost, and the state is the parent's.
    below: the rule is for keys below this number only; None: for all.
    """

    def __init__(self, parent: grain.IterDataset, batch: int, key: str, below: int | None = None):
        super().__init__(parent)
        self.batch, self.key, self.below = batch, key, below

    def __iter__(self) -> grain.DatasetIterator:
        return _UniqueBatchIterator(self._parent.__iter__(), self)


class _UniqueBatchIterator(grain.DatasetIterator):

    def __init__(self, parent: grain.DatasetIterator, dataset: UniqueBatchIterDataset):
        super().__init__(parent)
        self._dataset = dataset

    def __next__(self) -> Rows:
        rows: dict[int, Rows] = {}
        drawn = 0
        while len(rows) < self._dataset.batch:
            row = next(self._parent)
            drawn += 1
            key = int(row[self._dataset.key])
            free = self._dataset.below is not None and key >= self._dataset.below
            rows.setdefault(-drawn if free else key, row)
            if drawn > 100 * self._dataset.batch:
                raise UserError(f"no {self._dataset.batch} rows of different {self._dataset.key} among {drawn}; "
                                "lower the batch size")
        return {name: np.stack([row[name] for row in rows.values()]) for name in row}

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


class Batches(grain.DatasetIterator):
    """The batches of an iterator, whose state they have; and what those are made of, for who looks at it first.

    items: random access to single items (documents, rows), in the order in which batches take them.
    """

    def __init__(self, parent: grain.DatasetIterator, items: Any):
        super().__init__(parent)
        self.items = items

    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


def prefetched(batches: grain.IterDataset, ahead: int = 2) -> grain.DatasetIterator:
    """An iterator whose batches are made in a thread while the device works, `ahead` of them at most.

    get_state() is that of the batch last returned, however many are ready. Call close() at the end.
    """
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead))
