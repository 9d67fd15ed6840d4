"""What stage 5 makes of rewards: advantages, and which answers are learnt from. Their equations: tests/losses."""

from __future__ import annotations

import types

import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.rl import Grade
from glmv_jax.train import main
from tests.losses import policy_oracle as oracle

SMALL = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.group=4", "rollout.max_new_tokens=16"]
REWARDS = np.array([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.25]])
LENGTHS = np.array([[16, 3, 14, 2], [16, 2, 2, 2], [2, 2, 2, 2]])


def stage(*more):
    return main.stage_class("rl")(config.override(config.load("experiments/rl_grpo.py:size=nano"), [*SMALL, *more]))


def records(form=0.0):
    found = []
    for reward, length in zip(REWARDS.reshape(-1), LENGTHS.reshape(-1)):
        grade = Grade(reward, reward == 1.0, {"score": reward, "format": form * (length < 10)})
        found.append(types.SimpleNamespace(answer=np.zeros(length, int), truncated=length == 16, grade=grade))
    return found


def test_long_answers_lose_reward_and_stay_out_of_the_choice_of_groups():
    """The second group, in which one is long and all are wrong, has an advantage but is not learnt from."""
    made = stage("rollout.overlong.buffer=4", "rollout.overlong.penalty=0.5", "rollout.minibatches=2")
    advantages = made._advantages(records(), REWARDS)
    lost = REWARDS.copy()
    lost[0, 0], lost[0, 2], lost[1, 0] = -0.5, 0.75, -0.5
    np.testing.assert_allclose(advantages, oracle.advantages(lost, "grpo"), rtol=1e-5, atol=1e-6)
    assert made._minibatches(records(), REWARDS, advantages) == [[0, 1, 2, 3], [8, 9, 10, 11]]
    dropping = stage("rollout.overlong.drop=true")
    assert dropping._minibatches(records(), REWARDS, advantages) == [[1, 2, 3, 8, 9, 10, 11]]


def test_components_of_rewards():
    made = stage("rollout.advantage=gdpo", "rollout.components=(('score', 1.0), ('format', 0.5))")
    parts = np.stack([REWARDS, (LENGTHS < 10).astype(float)], -1)
    got = made._advantages(records(form=1.0), REWARDS)
    np.testing.assert_allclose(got, oracle.advantages(parts, "gdpo", (1.0, 0.5)), rtol=1e-5, atol=1e-5)
    # A group that is all wrong can still learn the form.
    assert made._minibatches(records(), REWARDS, got) == [[0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7]]


@pytest.mark.parametrize("kind", ["sampled", "top_k"])
def test_a_teacher_teaches_every_group(kind):
    made = stage("rollout.advantage=none", f"loss.distil.kind={kind}", "reference.teachers=(('*', 'runs/teacher'),)")
    advantages = made._advantages(records(), REWARDS)
    assert not advantages.any()
    assert sorted(made._minibatches(records(), REWARDS, advantages)[0]) == list(range(12))
