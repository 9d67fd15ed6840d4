"""The pipeline over the real engine and the real reward system: what each version draws is what the sampler draws.

Not covered: training between the batches (the weights are scaled instead); timing, so which answers span versions
differs from run to run.
"""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from glmv_jax import rl
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front
from glmv_jax.inference.sampler import BOX, Prompts, Sampler, Sampling
from glmv_jax.inference.settings import Settings as Sizes
from glmv_jax.rl.pipeline import Request, Scheduler, Settings
from glmv_jax.rl.pipeline.background import Background, Parts
from glmv_jax.rl.pipeline.local import Rows, rollouts, system_grader
from glmv_jax.rl.pipeline.slots import SlotEngine, seed_of
from glmv_jax.rl.prompts import prompt_rows
from glmv_jax.rl.rewards.system import RewardSystem
from tests import tiny_vlm

GROUP, NAMES = 2, ["count", "read"]
TOKENIZER = Tokenizer()
BUILDER = DocumentBuilder(TOKENIZER, Patcher(max_patches=16), max_tokens=40, max_patches=16)
CFG = tiny_vlm.config(vocab=TOKENIZER.vocab_size, patch=8)
CLOSE = TOKENIZER.special["</think>"]
SAMPLING = Sampling.chat(TOKENIZER, 12, allow=(*BOX, "</think>"), think=5, close=CLOSE)
LIMITS = {"read": 8}  # tokens of its answers


@pytest.fixture(scope="module")
def policies() -> list:
    tree = tiny_vlm.params(CFG)
    tree["decoder"]["head"] = tree["decoder"]["head"].at[:, TOKENIZER.eos].multiply(4.0)
    return [jax.tree.map(lambda x, n=n: x * (1.0 + 0.1 * n), tree) for n in range(8)]


def front(params, version: int) -> Front:
    sizes = Sizes(slots=4, length=52, steps=2, chunks=(40,), patches=(16,), pictures=32)
    return Front(Engine(CFG, params, SAMPLING, sizes, version=version))


def test_every_token_is_what_its_version_draws_and_every_answer_is_graded(policies, tmp_path):
    rows = Rows(prompt_rows(dict.fromkeys(NAMES, 1.0), BUILDER, seed=0))
    system = RewardSystem({"workers": 1, "sources": {
        "count": {"parts": {"rule": {"kind": "rule", "rule": "number"}}},
        "read": {"parts": {"rule": {"kind": "rule", "rule": "reading"}}},
    }})  # fmt: skip
    settings = Settings(2, GROUP, staleness=2, late="abort", in_flight=6)  # more than rows: some always wait

    async def build(step, groups):
        return rollouts(groups, rows)

    parts = Parts(
        functools.partial(Scheduler, rows, settings), SlotEngine(front, rows, 5, TOKENIZER, LIMITS),
        system_grader(rows, system, GROUP), build,
    )  # fmt: skip
    data = Background(parts, tmp_path)
    try:
        taken = [data.exchange(policies[version], version)[0] for version in range(8)]
        json.dumps(data.get_state())
    finally:
        data.close()
        system.close()
    sampler = Sampler(CFG, SAMPLING, GROUP)
    uids, whole, aborted, forced, cut = [], 0, 0, 0, 0
    for batch in taken:
        records, prompts = batch.batch
        for row, group in enumerate(batch.groups):
            uids.append(group.prompt.uid)
            for i, member in enumerate(group.members):
                drawn, record = member.answer.drawn, records[row * GROUP + i]
                aborted += member.aborts
                own = drawn.versions[drawn.versions >= 0]
                assert 0 <= batch.step - own[0] <= 2 and (np.diff(own) >= 0).all()
                assert record.text == member.answer.facts["text"] and "error" not in record.grade.flags
                put, forced = SAMPLING.put_at(drawn.tokens), forced + (len(own) < len(drawn))
                assert np.flatnonzero(drawn.versions < 0).tolist() == ([] if put is None else [put])
                if own[0] < own[-1]:
                    continue  # no one policy drew it
                request = Request(0, group.prompt, i, member.attempt)
                one = {name: x[row : row + 1] for name, x in prompts.items() if name != "samples"}
                key = jax.random.key(seed_of(5, request))
                out = jax.device_get(sampler(policies[drawn.versions[0]], Prompts.of(one), key))
                most = min(out.lengths[i], LIMITS.get(group.prompt.source, SAMPLING.max_new_tokens))
                np.testing.assert_array_equal(out.tokens[i, :most], drawn.tokens)
                np.testing.assert_allclose(out.logprobs[i, :most], drawn.logprobs, atol=1e-4)
                whole, cut = whole + 1, cut + (most < out.lengths[i])
                assert record.truncated == (most < out.lengths[i] or not out.finished[i])
    assert len(uids) == len(set(uids)) == 16 and whole >= 16 and aborted > 0 and forced > 4 and cut > 0
    assert {r.source for batch in taken for r in batch.batch[0]} == set(NAMES) == {*rl.verifiers(NAMES)}
