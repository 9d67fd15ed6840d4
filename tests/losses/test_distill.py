"""Feature distillation against float64 NumPy, torch's smooth-L1 and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.losses import distill
from glmv_jax.typing import UserError

B, P = 2, 6


def features(seed, channels=5, scale=2.0):
    return np.random.default_rng(seed).normal(size=(B, P, channels)) * scale


MASK = np.array([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1]], bool)


def loss_f64(predicted, target, weights, cosine=1.0, smooth_l1=1.0):
    total = 0.0
    for name, x in predicted.items():
        y, values = target[name], []
        for b, p in zip(*np.nonzero(MASK), strict=True):
            cos = x[b, p] @ y[b, p] / np.linalg.norm(x[b, p]) / np.linalg.norm(y[b, p])
            gap = np.abs(x[b, p] - y[b, p])
            values.append(cosine * (1 - cos) + smooth_l1 * np.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
        total += weights.get(name, 1.0) * np.mean(values)
    return total


def test_value_and_gradient_equal_float64():
    predicted = {"semantic": features(0), "texture": features(1, 3)}
    target = {"semantic": features(2), "texture": features(3, 3)}
    weights = {"texture": 0.25}
    f = lambda p: distill.distill_loss(p, jax.tree.map(jnp.asarray, target), MASK, weights, cosine=0.7)[0]  # noqa: E731
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), predicted)
    value, grads = jax.jit(jax.value_and_grad(f))(ours)
    assert float(value) == pytest.approx(loss_f64(predicted, target, weights, 0.7), rel=1e-5)
    grads = jax.device_get(grads)
    for name, index in [("semantic", (0, 0, 1)), ("texture", (1, 4, 2)), ("texture", (1, 5, 0))]:
        moved = []
        for h in (1e-6, -1e-6):
            shifted = {k: v.copy() for k, v in predicted.items()}
            shifted[name][index] += h
            moved.append(loss_f64(shifted, target, weights, 0.7))
        assert float(grads[name][index]) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-3)
    assert not np.asarray(grads["semantic"])[~MASK].any()


def test_terms_equal_torch():
    torch = pytest.importorskip("torch")
    x, y = features(4), features(5)
    _, metrics = jax.jit(distill.distill_loss)({"t": jnp.asarray(x)}, {"t": jnp.asarray(y)}, MASK)
    tx, ty = torch.tensor(x[MASK]), torch.tensor(y[MASK])
    assert float(metrics["t/smooth_l1"]) == pytest.approx(float(torch.nn.functional.smooth_l1_loss(tx, ty)), rel=1e-5)
    assert float(metrics["t/mse"]) == pytest.approx(float(torch.nn.functional.mse_loss(tx, ty)), rel=1e-5)
    assert float(metrics["t/cos"]) == pytest.approx(float(torch.cosine_similarity(tx, ty).mean()), rel=1e-5)


def test_each_term_counts_by_its_factor():
    x, y = {"t": jnp.asarray(features(4))}, {"t": jnp.asarray(features(5))}
    loss, metrics = jax.jit(lambda: distill.distill_loss(x, y, MASK, cosine=0.5, smooth_l1=0.0, mse=2.0))()
    assert float(loss) == pytest.approx(0.5 * (1 - float(metrics["t/cos"])) + 2.0 * float(metrics["t/mse"]), rel=1e-6)
    with pytest.raises(UserError, match="has no term; give loss.cosine"):
        distill.distill_loss(x, y, MASK, cosine=0.0, smooth_l1=0.0)


def test_an_exact_prediction_costs_nothing_and_a_zero_one_has_a_finite_gradient():
    y = {"t": jnp.asarray(features(6), jnp.float32)}
    loss = jax.jit(jax.value_and_grad(lambda p: distill.distill_loss(p, y, MASK)[0]))
    assert float(loss(y)[0]) == pytest.approx(0.0, abs=1e-6)
    grad = loss({"t": jnp.zeros((B, P, 5))})[1]
    assert np.isfinite(np.asarray(grad["t"])).all()


def test_names_that_differ_are_an_error():
    x = jnp.zeros((B, P, 5))
    with pytest.raises(ValueError, match="heads \\['a'\\], teachers \\['b'\\]"):
        distill.distill_loss({"a": x}, {"b": x}, MASK)


def test_cumulative_statistics_are_those_of_everything_seen():
    batches = [np.random.default_rng(i).normal(i, 1 + i, size=(4, 3, 5)) for i in range(6)]
    masks = [np.random.default_rng(9 + i).random((4, 3)) < 0.7 for i in range(6)]
    stats, update = distill.init_stats(5), jax.jit(distill.update_stats)
    for batch, mask in zip(batches, masks, strict=True):
        stats = update(stats, jnp.asarray(batch), mask)
    seen = np.concatenate([batch[mask] for batch, mask in zip(batches, masks, strict=True)])
    np.testing.assert_allclose(stats["mean"], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], seen.var(0), rtol=1e-5)
    assert float(stats["count"]) == len(seen)
    whitened = np.asarray(jax.jit(distill.standardise)(jnp.asarray(seen), stats))
    np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(whitened.std(0), 1, atol=1e-4)


def test_exponential_statistics_and_an_empty_mask():
    first, second = features(7), features(8)
    update = jax.jit(distill.update_stats, static_argnames="momentum")
    stats = update(distill.init_stats(5), jnp.asarray(first), momentum=0.9)
    np.testing.assert_allclose(stats["mean"], first.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], first.var((0, 1)), rtol=1e-5)
    after = update(stats, jnp.asarray(second), momentum=0.9)
    np.testing.assert_allclose(after["mean"], 0.9 * first.mean((0, 1)) + 0.1 * second.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(after["var"], 0.9 * first.var((0, 1)) + 0.1 * second.var((0, 1)), rtol=1e-4)
    for momentum in (None, 0.9):
        same = update(stats, jnp.asarray(second), np.zeros((B, P), bool), momentum=momentum)
        jax.tree.map(np.testing.assert_array_equal, same, stats)


def test_a_constant_channel_becomes_zero():
    stats = distill.update_stats(distill.init_stats(2), jnp.full((10, 2), 3.0))
    assert not np.asarray(distill.standardise(jnp.full((4, 2), 3.0), stats)).any()
