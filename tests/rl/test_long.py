"""Kinds whose answers are written apart get what a sampler of their length gives, the others what theirs gives.

Not covered: what it saves.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.sampler import Prompts, Sampler, Sampling
from glmv_jax.rl.prompts import prompts
from glmv_jax.rl.rollout import Long, drawn
from glmv_jax.train.main import stage_class
from glmv_jax.typing import UserError
from tests import tiny_vlm

TOKENIZER = Tokenizer()
BUILDER = DocumentBuilder(TOKENIZER, Patcher(max_patches=16), max_tokens=40, max_patches=16)
CFG = tiny_vlm.config(vocab=TOKENIZER.vocab_size, patch=8)
GROUP = 2


def test_answers_are_those_of_the_sampler_of_their_length():
    batch = next(prompts({"count": 1.0, "ground": 1.0}, BUILDER, batch=6, seed=0))
    (chosen,) = np.nonzero([sample.source == "ground" for sample in batch["samples"]])
    assert len(chosen) == 3  # two at a time: the second part is not full
    params, key = tiny_vlm.params(CFG), jax.random.key(0)
    # Greedy: which random numbers a row draws with depends on its place in the batch.
    short, long = (Sampler(CFG, Sampling.chat(TOKENIZER, n, temperature=0.0), GROUP) for n in (3, 7))
    found = drawn(short, Long(long, frozenset({"ground"}), 2), params, batch, key)
    whole = jax.device_get(short(params, Prompts.of(batch), key))
    others = np.repeat(~np.isin(np.arange(6), chosen), GROUP)
    check(found, np.flatnonzero(others), whole, np.flatnonzero(others), 3)
    assert (found.tokens[others, 3:] == TOKENIZER.pad).all() and not found.logprobs[others, 3:].any()
    for pair in chosen[[0, 2]], chosen[[1, 1]]:  # beside others than there
        rows = {name: batch[name][pair] for name in ("patches", "yx", "frame", *Prompts._fields[1:])}
        check(found, answers_of(pair), jax.device_get(long(params, Prompts.of(rows), key)), np.arange(2 * GROUP), 7)
    assert (found.lengths[~others] > 3).all(), "the test needs answers that are longer than the others may be"


def answers_of(prompts):
    return (prompts[:, None] * GROUP + np.arange(GROUP)).reshape(-1)


def check(found, rows, want, at, width):
    np.testing.assert_allclose(found.logprobs[rows, :width], want.logprobs[at], atol=1e-5)
    for ours, theirs in zip((found.tokens[:, :width], *found[2:]), (want.tokens, *want[2:])):
        np.testing.assert_array_equal(ours[rows], theirs[at])


@pytest.mark.parametrize(
    "change, said",
    [
        ("rollout.long.kinds=('trakc',)", "'trakc' is no source of data.weights"),
        ("rollout.long.max_new_tokens=8", "is below rollout.max_new_tokens=32"),
        ("rollout.overlong.buffer=4", "set one of the two"),
        ("rollout.pipeline=async", "of rollout.pipeline='sync'"),
    ],
)
def test_what_does_not_go_together_is_said(change, said):
    cfg = config.override(config.load("experiments/rl_mixed.py:size=nano"), [change])
    with pytest.raises(UserError, match=said):
        stage_class("rl")(cfg)
