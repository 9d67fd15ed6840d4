"""Mixtures: exact proportions, nothing skipped or repeated, state of one index."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from glmv_jax.data.mixture import Mixture
from glmv_jax.typing import UserError


class Numbers:
    """An endless source that says its name and index."""

    def __init__(self, name: str, length: int = 1 << 40):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, i: int):
        return self.name, i


def mixed(weights: dict[str, float]) -> Mixture:
    return Mixture({name: Numbers(name) for name in weights}, weights)


@pytest.mark.parametrize("weights", [
    {"natural": 0.8, "instruction": 0.1, "scientific": 0.1}, {"a": 3, "b": 7}, {"a": 0.3, "b": 0.7}, {"a": 1, "b": 1},
    {"a": 1}, {"a": 0.2, "b": 0.55, "c": 0.05, "d": 0.2}, {"a": 1, "b": 1000}, {"a": 1 / 3, "b": 2 / 3},
])
def test_proportions_hold_in_every_prefix_and_each_source_is_read_in_order(weights):
    mixture, n = mixed(weights), 3000
    total = sum(weights.values())
    seen = {name: 0 for name in weights}
    for k in range(n):
        name, index = mixture[k]
        assert index == seen[name], "a source's elements come one after the other"
        seen[name] += 1
        for other, count in seen.items():
            assert abs(count - (k + 1) * weights[other] / total) < len(weights)
    assert mixture.counts(n) == seen


def test_the_80_10_10_mixture_is_exact_in_each_ten():
    mixture = mixed({"natural": 0.8, "instruction": 0.1, "scientific": 0.1})
    for start in range(0, 500, 10):
        names = [mixture[k][0] for k in range(start, start + 10)]
        assert (names.count("natural"), names.count("instruction"), names.count("scientific")) == (8, 1, 1)


def test_floats_are_exact_over_long_runs():
    counts = mixed({"a": 0.3, "b": 0.7}).counts(10**12)
    assert counts == {"a": 3 * 10**11, "b": 7 * 10**11}


def test_any_index_can_be_read_alone():
    mixture = mixed({"a": 2, "b": 3, "c": 5})
    order = np.random.default_rng(0).permutation(200)
    alone = {int(k): mixture[int(k)] for k in order}
    assert [alone[k] for k in range(200)] == [mixture[k] for k in range(200)]


def test_finite_sources_start_again():
    mixture = Mixture({"a": Numbers("a", 3)}, {"a": 1})
    assert [mixture[k][1] for k in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_weight_zero_leaves_a_source_out():
    mixture = mixed({"a": 0, "b": 1})
    assert {name for name, _ in itertools.islice((mixture[k] for k in range(50)), 50)} == {"b"}


@pytest.mark.parametrize("weights", [{"a": -1, "b": 2}, {"a": 0, "b": 0}, {"a": float("nan"), "b": 1},
                                     {"a": float("inf"), "b": 1}, {"a": 1e-9, "b": 1}])
def test_wrong_weights_are_user_errors(weights):
    with pytest.raises(UserError, match="mixture weight"):
        mixed(weights)


def test_sources_and_weights_must_match():
    with pytest.raises(UserError, match="'c' needs both"):
        Mixture({"a": Numbers("a")}, {"a": 1, "c": 1})
