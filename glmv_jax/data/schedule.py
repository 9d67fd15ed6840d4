"""Batches of several shapes in turn: which one comes next depends on the seed and the number of the batch alone.

So every host draws the same, a resumed run goes on with the same, and each shape is one program. Each shape reads its
own stream, in its own order: what a row costs to make depends on its shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from glmv_jax.typing import UserError


class Schedule(grain.IterDataset):
    """Batch i is the next of `shapes[draw(i)]`. State: {"next_index": int, "streams": {name: state}}.

    shapes: name -> batches of one shape. shares: how often each is drawn; they need not add up to one.
    Raises: UserError for shares of other names, or none above zero.
    """

    def __init__(self, shapes: Mapping[str, grain.IterDataset], shares: Mapping[str, float], seed: int):
        super().__init__()
        self.names: Sequence[str] = list(shapes)
        weights = np.array([shares.get(name, 0.0) for name in shapes], np.float64)
        if set(shares) - set(shapes) or not weights.sum() > 0 or (weights < 0).any():
            raise UserError(f"shares {dict(shares)} do not fit the shapes {', '.join(shapes)}; give each one of them")
        self.shapes, self.seed = dict(shapes), seed
        self._cumulative = np.cumsum(weights / weights.sum())

    def draw(self, i: int) -> str:
        """The shape of batch i."""
        at = np.random.default_rng([self.seed, i]).random()
        return self.names[min(int(np.searchsorted(self._cumulative, at, side="right")), len(self.names) - 1)]

    def __iter__(self) -> grain.DatasetIterator:
        return _ScheduleIterator(self)


class _ScheduleIterator(grain.DatasetIterator):

    def __init__(self, schedule: Schedule):
        super().__init__()
        self._schedule = schedule
        self._next_index = 0
        self._streams = {name: iter(batches) for name, batches in schedule.shapes.items()}

    def __next__(self) -> Any:
        batch = next(self._streams[self._schedule.draw(self._next_index)])
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        streams = {name: stream.get_state() for name, stream in self._streams.items()}
        return {"next_index": self._next_index, "streams": streams}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next_index = int(state["next_index"])
        for name, stream in self._streams.items():
            stream.set_state(state["streams"][name])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
