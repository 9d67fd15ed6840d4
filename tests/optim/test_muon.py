"""Muon against a float64 NumPy rewrite and against torch.optim.Muon. Not covered: sharded Newton-Schulz."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax import optim


def newton_schulz_f64(x: np.ndarray) -> np.ndarray:
    """One matrix, float64, written from the published algorithm."""
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / (np.sqrt((x * x).sum()) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if flip else x


def muon_f64(param, grads, lr, wd, scaling, nesterov, beta=0.95):
    """`param` [L, I, O] after applying `grads` in turn."""
    param, moment = param.astype(np.float64), np.zeros(param.shape)
    rows, columns = param.shape[-2:]
    scale = 0.2 * np.sqrt(max(rows, columns)) if scaling == "rms" else np.sqrt(max(1, columns / rows))
    for t, grad in enumerate(grads):
        grad = grad.astype(np.float64)
        moment = beta * moment + (1 - beta) * grad
        ahead = beta * moment + (1 - beta) * grad if nesterov else moment
        param = param - lr(t) * (scale * np.stack([newton_schulz_f64(m) for m in ahead]) + wd * param)
    return param


@pytest.mark.parametrize(
    "shape, scaling, nesterov", [((3, 12, 20), "rms", True), ((2, 20, 12), "spectral", True), ((2, 9, 9), "rms", False)]
)
def test_two_hundred_steps_equal_float64(shape, scaling, nesterov):
    rng = np.random.default_rng(0)
    param = rng.normal(size=shape).astype(np.float32)
    drift = rng.normal(size=shape)
    grads = [(drift + rng.normal(size=shape)).astype(np.float32) for _ in range(200)]
    rate = lambda t: 0.02 * (1 - t / 250)  # noqa: E731
    tx = optim.muon(rate, weight_decay=0.1, scaling=scaling, nesterov=nesterov)
    got, state = jnp.asarray(param), tx.init(param)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for grad in grads:
        update, state = step(grad, state, got)
        got = got + update
    want = muon_f64(param, grads, rate, 0.1, scaling, nesterov)
    assert np.abs(want - param).max() > 0.5  # the run went somewhere
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.02), ("bfloat16", 0.04)])
@pytest.mark.parametrize("scaling, adjust", [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_first_step_equals_torch(scaling, adjust, dtype, tolerance):
    """torch iterates in bfloat16: that alone is 1.5 % (relative, Frobenius) away from float32 and bounds the match."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    param, grad = (rng.normal(size=(48, 96)).astype(np.float32) for _ in range(2))
    theirs = torch.nn.Parameter(torch.tensor(param.T.copy()))  # torch keeps [out, in]
    theirs.grad = torch.tensor(grad.T.copy())
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn=adjust).step()
    want = theirs.detach().numpy().T - param

    tx = optim.muon(0.1, weight_decay=0.1, scaling=scaling, dtype=jnp.dtype(dtype))
    got, _ = tx.update(grad, tx.init(param), param)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < tolerance


def test_each_matrix_of_a_stack_is_orthogonalised_by_itself():
    stack = np.random.default_rng(2).normal(size=(2, 3, 16, 8)) * np.array([1e-3, 1.0, 50.0])[:, None, None]
    together = optim.orthogonalise(jnp.asarray(stack))
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(together[i, j], newton_schulz_f64(stack[i, j]), atol=1e-4)
    values = np.linalg.svd(np.asarray(together), compute_uv=False)
    assert values.min() > 0.5 and values.max() < 1.3


def test_a_tall_matrix_costs_what_a_wide_one_does():
    def flops(*shape):
        return jax.jit(optim.orthogonalise).lower(jnp.zeros(shape)).compile().cost_analysis()["flops"]

    assert flops(96, 16) == pytest.approx(flops(16, 96), rel=0.01)


def test_a_zero_matrix_stays_zero():
    assert not np.asarray(optim.orthogonalise(jnp.zeros((2, 4, 6)))).any()


def test_rms_scaling_gives_the_update_size_of_adamw():
    grad = np.random.default_rng(3).normal(size=(64, 256)).astype(np.float32)
    tx = optim.scale_by_muon(scaling="rms")
    update, _ = tx.update(grad, tx.init(grad))
    assert np.sqrt(np.mean(np.square(update))) == pytest.approx(0.2, rel=0.15)


def test_momentum_is_float32_for_bfloat16_parameters():
    tx = optim.scale_by_muon()
    param = jnp.ones((4, 4), jnp.bfloat16)
    state = tx.init(param)
    assert state.momentum.dtype == jnp.float32
    assert tx.update(param, state)[1].momentum.dtype == jnp.float32


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="norm/scale has shape"):
        optim.scale_by_muon().init({"norm": {"scale": jnp.ones(3)}})
