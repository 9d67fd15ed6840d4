"""Answers of several lengths side by side are those of a sampler of each length, and nobody's depend on what was drawn
before.

Not covered: what it saves.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import BOX, Tokenizer
from glmv_jax.inference.batches import EngineSampler
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.sampler import Prompts, Sampler, Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.rl import Grade
from glmv_jax.rl.prompts import prompts
from glmv_jax.rl.rollout import rollout
from glmv_jax.train.main import stage_class
from glmv_jax.typing import UserError
from tests import tiny_vlm

TOKENIZER = Tokenizer()
BUILDER = DocumentBuilder(TOKENIZER, Patcher(max_patches=16), max_tokens=40, max_patches=16)
CFG = tiny_vlm.config(vocab=TOKENIZER.vocab_size, patch=8)
GROUP, SHORT, LONG = 2, 5, 9
THINKING = dict(allow=(*BOX, "</think>"), think=3, close=TOKENIZER.special["</think>"])


def test_answers_are_those_of_the_sampler_of_their_length():
    """The beginnings of longer ones, as every token has its own random numbers; thinking ends after three tokens."""
    made = prompts({"count": 1.0, "ground": 1.0}, BUILDER, batch=3, seed=0)
    batch, other = next(made), next(made)
    params, key, limits = tiny_vlm.params(CFG), jax.random.key(3), {"ground": LONG}
    sizes = Settings(slots=5, length=40 + LONG, chunks=(40,), patches=(16,), pictures=8, queue=3)
    engine = EngineSampler(Engine(CFG, None, Sampling.chat(TOKENIZER, SHORT, **THINKING), sizes), GROUP)
    score = lambda samples, texts: [Grade(0.0, False, {})] * len(texts)  # noqa: E731
    records = rollout(engine, params, batch, key, TOKENIZER, score, limits=limits)
    sampler = Sampler(CFG, Sampling.chat(TOKENIZER, LONG, **THINKING), GROUP)
    whole = jax.device_get(sampler(params, Prompts.of(batch), key))
    for n, record in enumerate(records):
        most = min(limits.get(record.source, SHORT), whole.lengths[n])
        np.testing.assert_array_equal(record.answer, whole.tokens[n, :most])
        np.testing.assert_allclose(record.logprobs, whole.logprobs[n, :most], atol=1e-5)
        assert record.truncated == (most < whole.lengths[n] or not whole.finished[n])
        put = np.flatnonzero(record.versions < 0).tolist()
        assert put == ([] if THINKING["close"] in record.answer[:3] else [3]) and record.answer[3] == THINKING["close"]
    assert {len(r.answer) for r in records} == {SHORT, LONG}, "the test needs answers that are cut, of both kinds"
    rollout(engine, params, other, jax.random.key(4), TOKENIZER, score, limits=limits)
    assert not engine.engine._slots.used.any(), "which rows are taken next must not depend on what was drawn before"
    again = rollout(engine, params, batch, key, TOKENIZER, score, limits=limits)
    for one, two in zip(records, again, strict=True):
        assert np.array_equal(one.answer, two.answer) and np.array_equal(one.logprobs, two.logprobs), "bit for bit"


def test_the_stage_draws_by_the_engine_where_it_has_slots():
    stages = []
    for changes in ([], ["rollout.slots=0", "rollout.limits=()"]):
        stages.append(stage_class("rl")(config.override(config.load("experiments/rl_mixed.py"), changes)))
    params = {"one": jax.numpy.zeros(1)}
    drawing = stages[0].drawing(params)
    assert stages[1].drawing(params) is stages[1].sampler and drawing is stages[0].drawing(params)
    assert isinstance(drawing, EngineSampler) and drawing.sampling == stages[0].sampler.sampling
    sizes = drawing.engine.settings
    assert (drawing.group, sizes.slots, sizes.length) == (8, 128, stages[0].asker.max_tokens + 80)


@pytest.mark.parametrize(
    "changes, said",
    [
        (["rollout.limits=(('trakc', 80),)"], "'trakc' is no source of data.weights"),
        (["rollout.limits=(('track', 1),)"], "answers have at least 2 tokens here"),
        (["rollout.overlong.buffer=4"], "set one of the two"),
        (["rollout.slots=0"], "set rollout.slots, 128 say"),
    ],
)
def test_what_does_not_go_together_is_said(changes, said):
    cfg = config.override(config.load("experiments/rl_mixed.py:size=nano"), changes)
    with pytest.raises(UserError, match=said):
        stage_class("rl")(cfg)
