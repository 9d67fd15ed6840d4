"""How hard a sample of a task is, from what it holds; and the samples of one level of a generator, by number.

Generators draw easy and hard samples as they come. A curriculum (`rl.curriculum`) wants to draw more of those that the
policy can do half of the time: levels are what it tells apart within a task.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from glmv_jax.data.records import Sample

LOTS = 256  # indices of the plain source that one of a level may be found among


@dataclasses.dataclass(frozen=True)
class Levels:
    """of: sample -> 0 (easy, in general) to count - 1. Each should be at least a tenth of the samples."""

    count: int
    of: Callable[[Sample], int]


ONE = Levels(1, lambda sample: 0)


def by(measure: Callable[[Sample], float], *bounds: float) -> Levels:
    """By a number: level k from the k-th bound on."""
    return Levels(len(bounds) + 1, lambda sample: bisect.bisect(bounds, measure(sample)))


def by_length(*bounds: int) -> Levels:
    """By the characters of the gold answer."""
    return by(lambda sample: len(sample.answer), *bounds)


def by_count(part: str, *bounds: int) -> Levels:
    """By how often a text is in the gold answer."""
    return by(lambda sample: sample.answer.count(part), *bounds)


def by_number(key: str, *bounds: int) -> Levels:
    """By how many things are in an entry of `meta`."""
    return by(lambda sample: len(sample.meta.get(key, ())), *bounds)


def by_kind(key: str, *kinds: str | tuple[str, ...]) -> Levels:
    """By an entry of `meta`; kinds of a tuple are one level, and what is not named is the last."""
    sets = [(kind,) if isinstance(kind, str) else kind for kind in kinds]
    found = lambda value: next((n for n, kind in enumerate(sets) if value in kind), len(sets) - 1)  # noqa: E731
    return Levels(len(sets), lambda sample: found(sample.meta.get(key)))


def by_size(*bounds: float) -> Levels:
    """By the first gold box, from large to small: bounds, falling, of its share of the picture."""

    def smallness(sample: Sample) -> float:
        x1, y1, x2, y2 = sample.meta["boxes"][0]
        return -(x2 - x1) * (y2 - y1) / 1e6

    return by(smallness, *(-bound for bound in bounds))


class OfLevel:
    """Endless random access to a source's samples of one level: number i is the first of them from index i * LOTS on.

    source: of samples, with random access.   ValueError where there is none among LOTS.
    """

    def __init__(self, source: Any, levels: Levels, level: int) -> None:
        self._source, self._levels, self._level = source, levels, level

    def __len__(self) -> int:
        return len(self._source) // LOTS

    def __getitem__(self, i: int) -> Sample:
        tried: Sequence[int] = range(i * LOTS, (i + 1) * LOTS)
        for index in tried:
            sample = self._source[index]
            if self._levels.of(sample) == self._level:
                return sample
        raise ValueError(f"none of {len(tried)} samples, such as {sample.id}, is of level {self._level}")
