"""Schedules by formula."""

from __future__ import annotations

import math

import pytest

from glmv_jax import optim
from glmv_jax.typing import UserError


@pytest.mark.parametrize("warmup", [10, 0.1])
def test_cosine_with_warmup(warmup):
    rate = optim.schedule(dict(warmup=warmup, decay="cosine", final=0.1), 2.0, 100)
    assert float(rate(0)) == pytest.approx(2.0 / 11)
    assert float(rate(9)) == pytest.approx(2.0 * 10 / 11)
    assert float(rate(10)) == pytest.approx(2.0)
    for t in (11, 40, 77):
        want = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (t - 10) / 90)) / 2)
        assert float(rate(t)) == pytest.approx(want, rel=1e-5)
    assert float(rate(100)) == pytest.approx(0.2)
    assert float(rate(500)) == pytest.approx(0.2)


def test_linear_and_constant():
    linear = optim.schedule(dict(decay="linear", final=0.5), 1.0, 10)
    assert [float(linear(t)) for t in (0, 5, 10, 20)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    constant = optim.schedule(dict(warmup=1, decay="constant"), 3.0, 10)
    assert [float(constant(t)) for t in (0, 1, 10)] == pytest.approx([1.5, 3.0, 3.0])


def test_a_run_of_warmup_only():
    assert float(optim.schedule(dict(warmup=4), 1.0, 4)(3)) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "cfg, message",
    [
        (dict(warm_up=3), "unknown key 'warm_up'; nearest: warmup"),
        (dict(warmup=11), "warmup=11 does not fit in 10 steps"),
        (dict(warmup=1.5), "neither a number of steps nor a fraction"),
        (dict(decay="step"), "decay='step' is not one of"),
    ],
)
def test_mistakes(cfg, message):
    with pytest.raises(UserError, match=message):
        optim.schedule(cfg, 1.0, 10)
