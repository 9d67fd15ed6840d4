"""Losses far above those before them. A spike is only told: nothing is left out of the training for it.

A loss is one when it lies more than `deviations` robust standard deviations above the median of the WINDOW losses
before it. The robust standard deviation is 1.4826 times the median distance from the median, which of normal noise is
the standard deviation, and which spikes hardly move (Rousseeuw and Croux, Alternatives to the Median Absolute
Deviation, 1993). It is taken to be FLOOR of the median at least: where losses hardly vary a small step is no news. A
new level that lasts is told for less than half a window.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

WINDOW = 64  # losses that one is compared with
ENOUGH = 32  # of them before any is told: the steep beginning of a run is no calm to stand out from
NORMAL = 1.4826
FLOOR = 1e-3


class Spike(NamedTuple):
    """value: the loss. median: of those before it. deviations: how many robust standard deviations it lies above."""

    value: float
    median: float
    deviations: float


class Spikes:
    """Watches one loss a step.

    Args: deviations: from how many on a loss is told; 0: never. before: the losses of earlier attempts, as `losses`.
    Attributes: metric: what is watched. losses: the last WINDOW ones, for a checkpoint.
    """

    def __init__(self, deviations: float, before: Iterable[float] = (), metric: str = "loss") -> None:
        self._deviations, self.metric = deviations, metric
        self._losses: collections.deque[float] = collections.deque(before, maxlen=WINDOW)

    @property
    def losses(self) -> list[float]:
        return list(self._losses)

    def next(self, loss: float) -> Spike | None:
        """The loss of a step; a Spike if it is one. What is not finite is nobody's measure, and is told elsewhere."""
        if not self._deviations or not math.isfinite(loss):
            return None
        before = self.losses
        self._losses.append(loss)
        if len(before) < ENOUGH:
            return None
        median = statistics.median(before)
        spread = NORMAL * statistics.median(abs(x - median) for x in before)
        found = Spike(loss, median, (loss - median) / max(spread, FLOOR * abs(median), 1e-12))
        return found if found.deviations > self._deviations else None
