"""Policy losses against float64 NumPy and finite differences. Not covered: packed rollouts, off-policy corrections."""

from __future__ import annotations

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.losses import policy

B, T = 4, 6
MASK = np.array([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0] * 6])


def make(seed=0):
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 0.5, (B, T))
    gap = rng.normal(0, 0.4, (B, T))
    # Both clips, both sides they do not hold, and one that only the wider upper clip lets through.
    gap[0, 1:4], gap[1, 2:4] = (0.5, 0.22, -0.5), (-0.5, 0.5)
    return dict(
        new=old + gap,
        old=old,
        reference=old + rng.normal(0, 0.3, (B, T)),
        advantage=np.array([1.5, -0.7, 0.4, 2.0]),
    )


def loss_f64(d, how, kl=0.0, low=0.2, high=0.28, max_length=None):
    rows, tokens = [], []
    for b in range(B):
        row = []
        for t in range(T):
            if MASK[b, t]:
                r, a = np.exp(d["new"][b, t] - d["old"][b, t]), d["advantage"][b]
                gap = d["new"][b, t] - d["reference"][b, t]
                row.append(max(-a * r, -a * min(max(r, 1 - low), 1 + high)) + kl * (np.exp(-gap) + gap - 1))
        if row:
            rows.append(row)
            tokens += row
    if how == "token-mean":
        return np.mean(tokens)
    if how == "seq-mean-token-mean":
        return np.mean([np.mean(row) for row in rows])
    return np.mean([np.sum(row) / max_length for row in rows])


@pytest.mark.parametrize("how", policy.AGGREGATIONS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_value_and_gradient_equal_float64(how, kl):
    d = make()
    f = lambda new: policy.policy_loss(  # noqa: E731
        new, d["old"], d["advantage"], MASK, how=how, kl=kl, reference_BT=d["reference"], max_length=10
    )[0]  # fmt: skip
    value, grad = jax.jit(jax.value_and_grad(f))(jnp.asarray(d["new"]))
    assert float(value) == pytest.approx(loss_f64(d, how, kl, max_length=10), rel=1e-5)
    grad = np.asarray(grad)
    assert not grad[MASK == 0].any()
    for index in zip(*np.nonzero(MASK), strict=True):
        moved = []
        for h in (1e-6, -1e-6):
            new = d["new"].copy()
            new[index] += h
            moved.append(loss_f64(dict(d, new=new), how, kl, max_length=10))
        assert grad[index] == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=2e-3, abs=1e-6)


def test_metrics():
    d = make(1)
    entropy = np.random.default_rng(2).random((B, T))
    loss = functools.partial(policy.policy_loss, reference_BT=d["reference"], entropy_BT=entropy)
    _, metrics = jax.jit(loss)(jnp.asarray(d["new"]), d["old"], d["advantage"], MASK)
    on = MASK > 0
    ratio = np.exp(d["new"] - d["old"])[on]
    a = np.broadcast_to(d["advantage"][:, None], MASK.shape)[on]
    clipped = ((a > 0) & (ratio > 1.28)) | ((a < 0) & (ratio < 0.8))
    assert 0 < clipped.mean() < 1
    gap = (d["new"] - d["reference"])[on]
    want = dict(
        ratio=ratio.mean(),
        ratio_max=ratio.max(),
        clip_fraction=clipped.mean(),
        approx_kl=(ratio - 1 - np.log(ratio)).mean(),
        reference_kl=(np.exp(-gap) + gap - 1).mean(),
        entropy=entropy[on].mean(),
    )
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(want, rel=1e-4)


def test_on_policy_gradient_is_the_policy_gradient():
    """At pi = pi_old nothing is clipped and the gradient is -A/denominator."""
    d = make(2)
    f = lambda new: policy.policy_loss(new, d["old"], d["advantage"], MASK, how="token-mean")[0]  # noqa: E731
    grad = jax.jit(jax.grad(f))(jnp.asarray(d["old"]))
    np.testing.assert_allclose(grad, -d["advantage"][:, None] * MASK / MASK.sum(), rtol=1e-5)


@pytest.mark.parametrize("how", policy.AGGREGATIONS)
def test_micro_batches_with_the_global_denominator_sum_to_the_whole(how):
    value = np.random.default_rng(3).normal(size=(B, T))
    whole = policy.aggregate(jnp.asarray(value), MASK, how, max_length=7)
    den = policy.denominators(MASK, how)
    parts = [
        policy.aggregate(jnp.asarray(value[i : i + 2]), MASK[i : i + 2], how, denominator=den, max_length=7)
        for i in (0, 2)
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


def test_group_advantages():
    reward = np.array([[0.0, 1.0, 1.0, 0.25], [0.1, 0.1, 0.1, 0.1], [3.0, -1.0, 2.0, 2.0]])
    got = np.asarray(policy.group_advantages(reward))
    plain = np.asarray(policy.group_advantages(reward, "dr_grpo"))
    for i in (0, 2):
        mean, std = statistics.fmean(reward[i]), statistics.stdev(reward[i])
        np.testing.assert_allclose(got[i], (reward[i] - mean) / (std + 1e-6), rtol=1e-5)
        np.testing.assert_allclose(plain[i], reward[i] - mean, rtol=1e-5, atol=1e-6)
    assert not got[1].any() and not plain[1].any()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e6 + 0.1])
@pytest.mark.parametrize("kind", policy.ADVANTAGES)
def test_a_group_without_variance_has_advantage_exactly_zero(value, kind):
    assert not np.asarray(policy.group_advantages(np.full((2, 7), value), kind)).any()


def test_a_group_of_one_and_other_mistakes():
    with pytest.raises(ValueError, match="raise the group size"):
        policy.group_advantages(np.zeros((4, 1)))
    with pytest.raises(ValueError, match="not one of grpo"):
        policy.group_advantages(np.zeros((4, 2)), "grp")
    with pytest.raises(ValueError, match="needs max_length"):
        policy.aggregate(jnp.zeros((B, T)), MASK, "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="not one of token-mean"):
        policy.aggregate(jnp.zeros((B, T)), MASK, "mean")
    with pytest.raises(ValueError, match="needs reference_BT"):
        policy.policy_loss(jnp.zeros((B, T)), jnp.zeros((B, T)), jnp.zeros(B), MASK, kl=0.1)


def test_extreme_ratios_and_empty_batches_stay_finite():
    new, old = jnp.full((B, T), 0.0), jnp.full((B, T), -500.0)
    loss, metrics = jax.jit(policy.policy_loss)(new, old, -np.ones(B), MASK)
    assert np.isfinite(float(loss)) and np.isfinite(float(metrics["ratio_max"]))
    f = lambda x: policy.policy_loss(x, old, jnp.ones(B), jnp.zeros((B, T)))[0]  # noqa: E731
    value, grad = jax.jit(jax.value_and_grad(f))(new)
    assert float(value) == 0.0 and not np.asarray(grad).any()
