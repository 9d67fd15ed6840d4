"""Batches of several shapes in turn: the same draw for all, state, shares. Not covered: hosts that really differ."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from glmv_jax.data import emoji, image_text
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.pipeline import Reading
from glmv_jax.data.schedule import Schedule
from glmv_jax.data.stream import Stream
from glmv_jax.data.text_rows import SharedRows
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError

ROWS = SharedRows(Tokenizer())
LENGTHS = {16: 0.5, 32: 0.25, 48: 0.25}


class Count:
    """Item i is (name, i)."""

    def __init__(self, name):
        self.name = name

    def __len__(self):
        return 10**6

    def __getitem__(self, i):
        return self.name, i


def schedule(seed=0, **shares):
    return Schedule({name: Stream(Count(name)) for name in shares}, shares, seed)


def test_shares_and_order_within_a_shape():
    batches = iter(schedule(a=2.0, b=1.0, c=1.0))
    drawn = [next(batches) for _ in range(4000)]
    counts = collections.Counter(name for name, _ in drawn)
    assert counts["a"] == pytest.approx(2000, abs=130) and counts["b"] == pytest.approx(1000, abs=110)
    for name in "abc":
        assert [i for n, i in drawn if n == name] == list(range(counts[name]))


def test_state_is_json_and_continues():
    batches = iter(schedule(a=1.0, b=1.0))
    for _ in range(57):
        next(batches)
    resumed = iter(schedule(a=1.0, b=1.0))
    resumed.set_state(json.loads(json.dumps(batches.get_state())))
    assert [next(resumed) for _ in range(50)] == [next(batches) for _ in range(50)]
    draws = lambda seed: [schedule(seed, a=1.0, b=1.0).draw(i) for i in range(50)]  # noqa: E731
    assert draws(0) != draws(1)


@pytest.mark.parametrize("shares", [{"a": 0.0}, {"a": -1.0, "b": 3.0}])
def test_shares_that_make_no_sense(shares):
    with pytest.raises(UserError, match="do not fit the shapes"):
        schedule(**shares)


def naflex(shard=0, shards=1, ahead=0):
    return image_text.siglip_batches(
        emoji.Pairs("train", 0), ROWS, Patcher(patch=8), batch=16, lengths=LENGTHS, text_length=28,
        reading=Reading(seed=3, shard=shard, shards=shards, ahead=ahead),
    )  # fmt: skip


def test_every_host_draws_the_same_lengths():
    """And the batch, which the loss is over, has the same rows whatever the length."""
    first, second = naflex(0, 2), naflex(1, 2)
    seen = set()
    for _ in range(12):
        one, two = next(first), next(second)
        assert one["patches"].shape == two["patches"].shape and len(one["patches"]) == 16
        assert not set(one["concept"]) & set(two["concept"])
        seen.add(one["patches"].shape[1])
        used = (one["frame"] > 0).sum(1)
        assert used.max() <= one["patches"].shape[1] and used.mean() > 0.6 * one["patches"].shape[1]
    assert seen == set(LENGTHS)


def test_resumes_in_the_middle_of_a_schedule():
    data = naflex(ahead=2)
    for _ in range(5):
        next(data)
    resumed = naflex()
    resumed.set_state(json.loads(json.dumps(data.get_state())))
    for _ in range(4):
        a, b = next(resumed), next(data)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    data.close()
