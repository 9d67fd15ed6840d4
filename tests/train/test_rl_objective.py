"""What stage 5 makes of rewards: advantages, and which answers are learnt from. Their equations: tests/losses."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.data.hashes import image_hash
from glmv_jax.rl import Grade
from glmv_jax.rl.batch import to_batch
from glmv_jax.rl.integrity import checked
from glmv_jax.rl.rollout import Rollout
from glmv_jax.train import main
from glmv_jax.typing import UserError
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
    advantages = made.chosen.advantages(records(), REWARDS)
    lost = REWARDS.copy()
    lost[0, 0], lost[0, 2], lost[1, 0] = -0.5, 0.75, -0.5
    np.testing.assert_allclose(advantages, oracle.advantages(lost, "grpo"), rtol=1e-5, atol=1e-6)
    assert made.chosen.minibatches(records(), REWARDS, advantages) == [[0, 1, 2, 3], [8, 9, 10, 11]]
    dropping = stage("rollout.overlong.drop=true")
    assert dropping.chosen.minibatches(records(), REWARDS, advantages) == [[1, 2, 3, 8, 9, 10, 11]]


def test_components_of_rewards():
    made = stage("rollout.advantage=gdpo", "rollout.components=(('score', 1.0), ('format', 0.5))")
    parts = np.stack([REWARDS, (LENGTHS < 10).astype(float)], -1)
    got = made.chosen.advantages(records(form=1.0), REWARDS)
    np.testing.assert_allclose(got, oracle.advantages(parts, "gdpo", (1.0, 0.5)), rtol=1e-5, atol=1e-5)
    # A group that is all wrong can still learn the form.
    assert made.chosen.minibatches(records(), REWARDS, got) == [[0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7]]


@pytest.mark.parametrize("kind", ["sampled", "top_k"])
def test_a_teacher_teaches_every_group(kind):
    made = stage("rollout.advantage=none", f"loss.distil.kind={kind}", "reference.teachers=(('*', 'runs/teacher'),)")
    advantages = made.chosen.advantages(records(), REWARDS)
    assert not advantages.any()
    assert sorted(made.chosen.minibatches(records(), REWARDS, advantages)[0]) == list(range(12))


def test_the_mismatch_is_told_by_whether_there_is_an_image():
    """Against NumPy over the answers, some to questions with an image and some to questions without, in packed rows."""
    cfg = config.load("experiments/rl_grpo.py:size=nano")
    cfg.data.weights = {"count": 1.0, "riddle": 1.0}
    more = ["rollout.prompts=6", "data.prompt_tokens=96", "data.tokens=256", "data.ahead=0"]
    made = main.stage_class("rl")(config.override(cfg, [*SMALL, *more]))
    data, rng = made.train_data(), np.random.default_rng(0)
    prompts = next(data)
    data.close()
    answers = []
    for row in range(6):
        seen = prompts["frame"][row] > 0
        about = dict(
            id=str(row), row=row, source=prompts["samples"][row].source, text="", truncated=False,
            grade=Grade(1.0, True, {}), prompt=prompts["tokens"][row][: prompts["length"][row]],
            image_hash=image_hash(prompts["patches"][row][seen], prompts["yx"][row][seen]),
        )  # fmt: skip
        for _ in range(2):
            n = int(rng.integers(1, 9))
            answers.append(Rollout(answer=rng.integers(10, 99, n), logprobs=rng.normal(-8, 0.3, n), **about))
    batch, left_out = to_batch(answers, prompts, np.ones(12), rows=(4,), tokens=256, patches=128, names=made.names,
                               targets=208, per="token")  # fmt: skip
    batch, params = checked(batch), made.init_params(jax.random.key(0))
    both = jax.jit(lambda p, b: (made.loss(p, {}, {}, b, jax.random.key(0))[1][0], made.others.logprobs(p, b)))
    metrics, logprob_BT = jax.device_get(both(params, batch))
    on = batch["loss_weight"] > 0
    rho = np.exp(logprob_BT - batch["old_logprob"], dtype=np.float64)
    pictured = batch["source"] == made.names.index("count")
    for name, where in (("with image", on & pictured), ("without image", on & ~pictured)):
        drawn = sum(len(a.answer) for a in answers if bool(a.image_hash) == (name == "with image"))
        assert where.sum() == drawn > 10 and not left_out
        kl = (rho - 1 - np.log(rho))[where].mean()
        assert metrics[f"mismatch_kl/{name}"] == pytest.approx(kl, rel=1e-4) and kl > 0.001
        assert metrics[f"mismatch_gap/{name}_max"] == pytest.approx(np.abs(np.log(rho[where])).max(), rel=1e-4)


def test_thinking_is_ended_by_force_and_what_was_put_there_is_not_learnt():
    made = stage("rollout.thinking=4", "rollout.prompts=4", "rollout.rows=(8,)", "data.ahead=0")
    graded, special = [], made.tokenizer.special

    def by_length(text, sample):
        graded.append(text)
        return Grade(float(len(text) % 3), False, {})

    made.verifiers = dict.fromkeys(made.names, by_length)
    data, state = made.train_data(), types.SimpleNamespace(params=made.init_params(jax.random.key(0)), step=0)
    prompts = next(data)
    assert {int(row[n - 1]) for row, n in zip(prompts["tokens"], prompts["length"])} == {special["<think>"]}
    batch, metrics = made.next_batch(data, state)
    data.close()
    assert metrics["length/mean"] <= 15.0, "of what was drawn"
    starts = np.argwhere((batch["branches"] > 0) & (np.diff(batch["branches"], prepend=0, axis=1) != 0))
    put = 0
    for row, at in starts:
        of = batch["branches"][row, at + 1 :] == batch["branches"][row, at]
        n = int(np.argmin(of)) if not of.all() else len(of)
        ids = batch["tokens"][row, at + 1 : at + 1 + n]
        learnt, old = (batch[name][row, at + 1 : at + 1 + n] for name in ("loss_weight", "old_logprob"))
        if n > 4 and special["</think>"] not in ids[:4]:
            assert ids[4] == special["</think>"] and learnt[4] == 0 and old[4] == 0 and learnt.sum() == n - 1
            put += 1
        else:
            assert learnt.all()
    assert put > 4 and len(starts) >= 8 and not any("think>" in text for text in graded)
    with pytest.raises(UserError, match="rollout.top_p=0.9 draws from a part of the policy's distribution"):
        stage("rollout.top_p=0.9")
    with pytest.raises(UserError, match="leaves no room for an answer in rollout.max_new_tokens=16"):
        stage("rollout.thinking=15")
