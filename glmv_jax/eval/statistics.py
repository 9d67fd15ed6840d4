"""What runs that differ in their seed say: means, how sure they are, and how steady a curve is.

The interval of a mean is Student's: mean +- t * sd / sqrt(n) with n - 1 degrees of freedom, which takes the numbers of
different seeds as independent draws of one normal distribution. Two arms that share their seeds are compared seed by
seed, as what a seed decides (the batches, the first parameters) is then in both and cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.95


class Spread(NamedTuple):
    """n numbers: their mean, standard deviation (n - 1 below the root) and the interval of the mean, low to high.

    A single number has neither deviation nor interval: they are None.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None

    @property
    def differs(self) -> bool | None:
        """Of differences: whether the interval leaves 0 out; None where there is no interval."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


def spread(values: Sequence[float], level: float = LEVEL) -> Spread:
    """Mean, deviation and interval. Raises ValueError for no values: no number can be given for nothing."""
    n = len(values)
    if not n:
        raise ValueError("spread of no values")
    mean = statistics.fmean(values)
    if n == 1:
        return Spread(1, mean, None, None, None)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = t_quantile(0.5 + level / 2, n - 1) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def paired(a: Mapping[int, float], b: Mapping[int, float], level: float = LEVEL) -> Spread | None:
    """a - b over the seeds (keys) that both have; None when there is none."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    return spread(differences, level) if differences else None


def t_quantile(p: float, freedom: int) -> float:
    """The t with P(T <= t) = p of Student's distribution with a whole number of degrees of freedom.

    Raises: ValueError unless 0 < p < 1 and freedom >= 1.
    """
    if not 0 < p < 1 or freedom < 1:
        raise ValueError(f"no t quantile for p={p}, freedom={freedom}")
    if p < 0.5:
        return -t_quantile(1 - p, freedom)
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(80):  # halves the bracket below what a float can tell apart
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, freedom) < 2 * p - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _central(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)): Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):  # powers 1, 3, ... or 0, 2, ... of the cosine, below freedom - 1
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


class Steadiness(NamedTuple):
    """sd: root mean square of value minus running mean; jump: the largest value minus running mean. None: no values."""

    sd: float | None
    jump: float | None


def steadiness(points: Sequence[tuple[float, float]], smooth: Sequence[tuple[float, float]]) -> Steadiness:
    """How far a curve strays from its own running mean over the last third of its steps.

    points: (step, value), in order. smooth: the same steps with the running mean (`report_svg.running_mean`).
    """
    if not points:
        return Steadiness(None, None)
    begin = points[0][0] + 2 / 3 * (points[-1][0] - points[0][0])
    strays = [y - m for (x, y), (_, m) in zip(points, smooth, strict=True) if x >= begin]
    return Steadiness(math.sqrt(math.fsum(s * s for s in strays) / len(strays)), max(strays))
