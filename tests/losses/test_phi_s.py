"""PHI-S against a float64 NumPy rewrite of its definition, and Hadamard matrices of every width that teachers have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from glmv_jax.losses import phi_s
from glmv_jax.typing import UserError

C = 12


def rows(seed, n):
    """Features with a mean, correlations and channels of very different size."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(C, C)) * np.logspace(-2, 1, C)
    return rng.normal(size=(n, C)) @ mix + 5.0


def seen(parts):
    moments = []
    for part in parts:
        mean, scatter = jax.jit(phi_s.batch_moments)(jnp.asarray(part, jnp.float32))
        moments.append(phi_s.Moments(len(part), np.float64(mean), np.float64(scatter)))
    return sum(moments[1:], moments[0])


@pytest.mark.parametrize("n", [1, 2, 12, 72, 108, 384, 768, 1024, 1152, 1280, 1536, 4096])
def test_hadamard(n):
    h = phi_s.hadamard(n)
    np.testing.assert_allclose(np.abs(h), n**-0.5, rtol=1e-12)
    x = np.random.default_rng(0).normal(size=(n, 8))
    np.testing.assert_allclose(h @ (h.T @ x), x, atol=1e-10)
    if n <= 1536:
        np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-12)
    if n & (n - 1) == 0:
        np.testing.assert_array_equal(h * np.sqrt(n), scipy.linalg.hadamard(n))


@pytest.mark.parametrize("n", [3, 100, 92, 1000 + 1])
def test_no_hadamard_matrix_is_one_line(n):
    with pytest.raises(UserError, match=f'none here for {n} channels; set this teacher\'s normalise="channel"'):
        phi_s.init(n)


def test_moments_of_unequal_batches_are_those_of_all_rows():
    x = rows(0, 300)
    moments = seen([x[:64], x[64:100], x[100:]])
    assert moments.count == 300
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.scatter / 300, np.cov(x.T, bias=True), rtol=1e-4, atol=1e-4)


def test_transform_is_the_definition_and_can_be_undone():
    x = rows(1, 4000)
    fitted = phi_s.fit(seen([x[:1000], x[1000:]]))
    y = np.asarray(jax.jit(phi_s.apply)(jnp.asarray(x.reshape(4, 1000, C), jnp.float32), fitted)).reshape(-1, C)
    # Unit variance in every channel, by one factor: distances are kept but for it.
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-4)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    phi = np.sqrt(values.mean())
    want = np.linalg.norm(x[:50, None] - x[None, :50], axis=-1) / phi
    np.testing.assert_allclose(np.linalg.norm(y[:50, None] - y[None, :50], axis=-1), want, rtol=1e-3, atol=1e-4)
    # y = H U^T (x - mean) / phi, up to the signs of eigenvectors, which are free.
    turned = phi_s.hadamard(C).T @ y.T * phi
    np.testing.assert_allclose(np.abs(turned), np.abs(vectors.T @ (x - x.mean(0)).T), rtol=1e-3, atol=2e-3)
    back = y * phi @ phi_s.hadamard(C) @ vectors_of(fitted, phi).T + fitted["mean"]
    np.testing.assert_allclose(back, x, rtol=1e-3, atol=1e-2)


def vectors_of(fitted, phi):
    """U out of turn = H U^T / phi."""
    return (phi_s.hadamard(C).T @ fitted["turn"] * phi).T


def test_too_few_features_and_none_at_all():
    with pytest.raises(UserError, match="saw 5 features of 12 channels; raise loss.calibration"):
        phi_s.fit(seen([rows(2, 5)]))
    assert np.isnan(np.asarray(phi_s.apply(jnp.ones((3, C)), phi_s.init(C)))).all()


def test_features_that_never_vary_become_zero():
    assert not np.asarray(phi_s.apply(jnp.full((3, C), 2.0), phi_s.fit(seen([np.full((40, C), 2.0)])))).any()
