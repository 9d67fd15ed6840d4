"""Next-token cross-entropy and the MTP loss against float64 NumPy, torch and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.losses import cross_entropy as ce
from glmv_jax.losses import mtp

B, T, V = 3, 9, 11


def make(seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        logits=rng.normal(size=(B, T, V)) * 3,
        tokens=rng.integers(0, V, (B, T)),
        weight=rng.choice([0.0, 0.5, 1.0, 2.0], (B, T)),
        segments=np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9, [1, 2, 1, 2, 1, 3, 3, 3, 3]]),
        image=rng.random((B, T)) < 0.3,
    )


def log_softmax_f64(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def loss_by_loops(d, ahead, image=None, z=0.0, logits=None):
    """Every position by itself: float64, no shifts."""
    logits = d["logits"] if logits is None else logits
    logp, total, weight, correct, used = log_softmax_f64(logits), 0.0, 0.0, 0.0, np.zeros((B, T))
    for b in range(B):
        for i in range(T):
            hops = {i, i + 1} if ahead == 1 else {i, i + ahead - 1, i + ahead}
            if i + ahead >= T or len({d["segments"][b, j] for j in hops}) > 1 or d["segments"][b, i] == 0:
                continue
            target, w = d["tokens"][b, i + ahead], d["weight"][b, i + ahead]
            if image is not None and image[b, i + ahead]:
                continue
            lse = np.log(np.exp(logits[b, i]).sum())
            total += w * (-logp[b, i, target] + z * lse**2)
            weight += w
            correct += w * (logits[b, i].argmax() == target)
            used[b, i] = w
    return total / weight, correct / weight, used


@pytest.mark.parametrize("z", [0.0, 1e-2])
def test_next_token_equals_float64_loops(z):
    d = make()
    targets, weight = jax.jit(ce.next_targets)(d["tokens"], d["weight"], d["segments"])
    got = jax.jit(ce.cross_entropy, static_argnames="z_loss")(d["logits"], targets, weight, z_loss=z)
    want, accuracy, used = loss_by_loops(d, 1, z=z)
    np.testing.assert_allclose(weight, used)
    assert float(got.loss) == pytest.approx(want, rel=1e-6)
    assert float(ce.accuracy(jnp.asarray(d["logits"]), targets, weight)) == pytest.approx(accuracy)


def test_value_and_gradient_equal_torch():
    torch = pytest.importorskip("torch")
    d = make(1)
    targets = d["tokens"]
    logits = torch.tensor(d["logits"], requires_grad=True)
    nll = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.tensor(targets.reshape(-1)), reduction="none")
    loss = (nll * torch.tensor(d["weight"].reshape(-1))).sum() / 7.0
    loss.backward()
    f = jax.jit(lambda x: ce.cross_entropy(x, targets, d["weight"], denominator=7.0))
    got = f(jnp.asarray(d["logits"]))
    assert float(got.loss) == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(got.nll_BT.reshape(-1), nll.detach().numpy(), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.grad(lambda x: f(x).loss)(jnp.asarray(d["logits"])), logits.grad.numpy(), atol=1e-6
    )


def test_micro_batches_with_the_global_denominator_sum_to_the_whole():
    d = make(2)
    loss = jax.jit(ce.cross_entropy)
    whole = loss(d["logits"], d["tokens"], d["weight"])
    rows = [{name: d[name][i : i + 1] for name in ("logits", "tokens", "weight")} for i in range(B)]
    parts = [loss(r["logits"], r["tokens"], r["weight"], denominator=whole.weight).loss for r in rows]
    assert float(sum(parts)) == pytest.approx(float(whole.loss), rel=1e-6)


def test_a_batch_without_targets_has_loss_and_gradient_zero():
    f = lambda x: ce.cross_entropy(x, jnp.zeros((1, 2), int), jnp.zeros((1, 2))).loss  # noqa: E731
    value, grad = jax.jit(jax.value_and_grad(f))(jnp.ones((1, 2, V)))
    assert float(value) == 0.0 and not np.asarray(grad).any()


def test_per_source_sums_leave_out_padding():
    value, weight = np.arange(6.0).reshape(2, 3), np.array([[1, 1, 2], [0, 1, 1]])
    total, count = ce.per_source(jnp.asarray(value), jnp.asarray(weight), np.array([[0, 2, 2], [2, 0, -1]]), 4)
    np.testing.assert_allclose(total, [0 + 4, 0, 1 + 4 + 0, 0])
    np.testing.assert_allclose(count, [2, 0, 3, 0])


def test_logprobs_and_entropy():
    d = make(3)
    logp = log_softmax_f64(d["logits"])
    want = np.take_along_axis(logp, d["tokens"][..., None], -1)[..., 0]
    np.testing.assert_allclose(ce.logprobs(jnp.asarray(d["logits"]), d["tokens"]), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ce.entropy(jnp.asarray(d["logits"])), -(np.exp(logp) * logp).sum(-1), rtol=1e-4)


def test_mtp_equals_float64_loops():
    d = make(4)
    depths = [np.random.default_rng(k).normal(size=(B, T, V)) * 2 for k in range(3)]
    got = jax.jit(mtp.mtp_loss)(depths, d["tokens"], d["segments"], d["weight"], d["image"])
    for k, logits in enumerate(depths, start=1):
        want, accuracy, used = loss_by_loops(d, k + 1, d["image"], logits=logits)
        _, weight = mtp.mtp_targets(d["tokens"], d["segments"], jnp.asarray(d["weight"]), d["image"], k)
        np.testing.assert_allclose(weight, used)
        assert used.any()
        assert float(got.loss_K[k - 1]) == pytest.approx(want, rel=1e-5)
        assert float(got.accuracy_K[k - 1]) == pytest.approx(accuracy)
    assert float(got.loss) == pytest.approx(float(np.mean(got.loss_K)), rel=1e-6)
    assert np.isnan(got.agreement_K).all()


def test_mtp_agreement_is_with_the_main_model_at_the_same_target():
    d = make(5)
    ones, one_segment, text = np.ones((B, T)), np.ones((B, T), int), np.zeros((B, T), bool)
    main, loss = d["logits"], jax.jit(mtp.mtp_loss)
    for k in (1, 2):
        drafts = [np.zeros((B, T, V))] * (k - 1) + [np.roll(main, -k, axis=1)]
        got = loss(drafts, d["tokens"], one_segment, ones, text, main_logits_BTV=main)
        assert float(got.agreement_K[k - 1]) == 1.0
    assert float(loss([main], d["tokens"], one_segment, ones, text, main_logits_BTV=main).agreement_K[0]) < 0.5


def test_an_image_is_never_a_target_but_may_be_where_one_stands():
    tokens, segments, weight = np.arange(1, 6)[None], np.ones((1, 5), int), np.ones((1, 5))
    image = np.array([[False, True, True, False, False]])
    _, got = mtp.mtp_targets(tokens, segments, weight, image, 1)
    np.testing.assert_array_equal(got, [[0, 1, 1, 0, 0]])


def test_a_row_shorter_than_the_depth_has_no_target():
    _, weight = mtp.mtp_targets(np.ones((1, 2), int), np.ones((1, 2), int), np.ones((1, 2)), np.zeros((1, 2), bool), 3)
    assert not np.asarray(weight).any()


def test_no_head_is_an_error():
    with pytest.raises(ValueError, match="got no logits"):
        mtp.mtp_loss([], np.ones((1, 2), int), np.ones((1, 2), int), np.ones((1, 2)), np.zeros((1, 2), bool))
