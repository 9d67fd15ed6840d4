"""Accept length and break-even against simulated passes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glmv_jax.inference import acceptance
from glmv_jax.inference.settings import Counts


def test_accept_length_is_the_mean_of_simulated_passes():
    rates = [0.8, 0.6, 0.5]
    kept = np.cumprod(np.random.default_rng(0).random((200_000, 3)) < rates, axis=1)
    counts = Counts(reached=np.array([len(kept), *kept.sum(0)[:2]]), accepted=kept.sum(0))
    measured = acceptance.rates(counts)
    np.testing.assert_allclose(measured, rates, atol=0.01)
    np.testing.assert_allclose(acceptance.accept_length(measured), 1 + kept.sum(1).mean(), rtol=1e-6)


def test_a_draft_that_was_never_reached_counts_as_rejected():
    measured = acceptance.rates(Counts(reached=np.array([7, 0]), accepted=np.array([0, 0])))
    assert measured[0] == 0 and math.isnan(measured[1]) and acceptance.accept_length(measured) == 1


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_break_even_is_where_the_speed_up_is_one(drafts):
    rate = acceptance.break_even(drafts, 1.3, 0.1)
    assert 0 < rate < 1
    np.testing.assert_allclose(acceptance.speedup([rate] * drafts, 1.3, 0.1), 1.0, rtol=1e-9)
    assert acceptance.break_even(drafts, 1.0, 0.0) == 0 and acceptance.break_even(drafts, drafts + 1.1, 0) == math.inf


def test_one_sure_draft_that_costs_nothing_doubles_the_speed():
    assert acceptance.speedup([1.0], 1.0, 0.0) == 2.0
    np.testing.assert_allclose(acceptance.speedup([0.5, 0.5], 1.5, 0.125), 1.0)
