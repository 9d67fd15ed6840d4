"""Means and intervals over seeds against SciPy, steadiness against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from glmv_jax.eval import report_svg, statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 29, 30, 199])
@pytest.mark.parametrize("p", [0.005, 0.1, 0.5, 0.6, 0.9, 0.975, 0.9995])
def test_quantiles_of_t(p, freedom):
    np.testing.assert_allclose(statistics.t_quantile(p, freedom), stats.t.ppf(p, freedom), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 6])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_interval_of_a_mean(n, level):
    values = np.random.default_rng(n).normal(3.0, 0.2, n)
    found = statistics.spread(list(values), level)
    low, high = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(found, (n, values.mean(), values.std(ddof=1), low, high), rtol=1e-9)


def test_interval_covers_the_mean_as_often_as_it_says():
    """Not only SciPy's number: of 2,000 samples of 5 about 95 % hold the truth (5 standard errors either way)."""
    draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, 5))
    hits = [s.low <= 1.0 <= s.high for s in (statistics.spread(list(row)) for row in draws)]
    assert abs(np.mean(hits) - 0.95) < 5 * np.sqrt(0.95 * 0.05 / 2000)


def test_paired_differences_are_those_of_scipys_paired_test():
    rng = np.random.default_rng(1)
    common = rng.normal(0, 1.0, 5)  # what a seed decides, far larger than what the arms differ by
    a, b = common + 0.1 + rng.normal(0, 0.02, 5), common + rng.normal(0, 0.02, 5)
    found = statistics.paired(dict(enumerate(a)), dict(enumerate(b)))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(found[1:], (np.mean(a - b), np.std(a - b, ddof=1), *interval), rtol=1e-9)
    assert found.differs is True
    apart = statistics.spread(list(a)), statistics.spread(list(b))
    assert apart[0].low < apart[1].high  # unpaired, the same numbers overlap


def test_pairs_are_made_by_seed_and_a_single_seed_has_no_interval():
    assert statistics.paired({0: 1.0, 1: 5.0, 7: 2.0}, {1: 4.0, 7: 1.0, 9: 0.0})[:2] == (2, 1.0)
    one = statistics.paired({3: 2.0}, {3: 0.5})
    assert one == (1, 1.5, None, None, None) and one.differs is None
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None
    assert statistics.spread([0.5, -0.5, 0.1]).differs is False
    with pytest.raises(ValueError, match="no values"):
        statistics.spread([])
    with pytest.raises(ValueError, match="freedom=0"):
        statistics.t_quantile(0.975, 0)


def test_steadiness_is_of_the_last_third_and_does_not_count_the_trend():
    rng = np.random.default_rng(2)
    steps = np.arange(1, 901)
    noise = np.where(steps > 570, 0.05, 5.0) * rng.normal(size=900)
    points = [(float(x), float(8.0 - 0.008 * x + e)) for x, e in zip(steps, noise)]  # quiet before the third begins
    found = statistics.steadiness(points, report_svg.running_mean(points))
    np.testing.assert_allclose(found.sd, 0.05, rtol=0.12)  # the trend alone would give 0.69, all steps 3.3
    np.testing.assert_allclose(found.jump, noise[600:].max(), rtol=0.25)
    spiked = [(x, y + 1.0 * (x == 800)) for x, y in points]
    assert statistics.steadiness(spiked, report_svg.running_mean(spiked)).jump > 0.8
    assert statistics.steadiness([], []) == (None, None)
    assert statistics.steadiness([(3.0, 2.0)], [(3.0, 2.0)]) == (0.0, 0.0)
