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
    long_rows = np.repeat([sample.source == "ground" for sample in batch["samples"]], GROUP)
    assert long_rows.sum() == 3 * GROUP  # two at a time: the second part is not full
    params, key = tiny_vlm.params(CFG), jax.random.key(0)
    # Greedy: which random numbers a row draws with depends on its place in the batch.
    short, long = (Sampler(CFG, Sampling.chat(TOKENIZER, n, temperature=0.0), GROUP) for n in (3, 7))
    found = drawn(short, Long(long, frozenset({"ground"}), 2), params, batch, key)
    of_short, of_long = (jax.device_get(sampler(params, Prompts.of(batch), key)) for sampler in (short, long))
    assert (of_long.lengths[long_rows] > 3).all(), "the test needs answers that are longer than the others may be"
    for name in ("tokens", "logprobs"):
        ours, width = getattr(found, name), 3
        np.testing.assert_allclose(ours[long_rows], getattr(of_long, name)[long_rows], atol=1e-5)
        np.testing.assert_allclose(ours[~long_rows, :width], getattr(of_short, name)[~long_rows], atol=1e-5)
    assert (found.tokens[~long_rows, 3:] == TOKENIZER.pad).all() and not found.logprobs[~long_rows, 3:].any()
    for name in ("lengths", "finished"):
        whole = np.where(long_rows, getattr(of_long, name), getattr(of_short, name))
        np.testing.assert_array_equal(getattr(found, name), whole)


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
