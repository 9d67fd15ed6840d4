"""The gated delta rule in chunks against its recurrence, in float64 NumPy position by position, and its gradient
against that of the recurrence in JAX. Against transformers in tests/interop/test_glm5_next.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels.delta_rule import delta_rule

B, T, H, K, V = 2, 41, 3, 8, 6


def inputs(seed: int = 0, decay: float = 1.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(B, T, H, K)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, g = rng.normal(size=(B, T, H, V)), -decay * rng.exponential(size=(B, T, H, K))
    return tuple(x.astype(np.float32) for x in (q, k, v, g, rng.uniform(size=(B, T, H))))


def recurrence(q, k, v, g, beta, segments=None, state=None):
    """One row and one head after another."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q, k, v, g, beta))
    rows, length = q.shape[:2]
    out, last = np.zeros((rows, length, H, V)), np.zeros((rows, H, K, V))
    for b in range(rows):
        for h in range(H):
            S = np.zeros((K, V)) if state is None else np.array(state[b, h], np.float64)
            for t in range(length):
                if segments is not None and t > 0 and segments[b, t] != segments[b, t - 1]:
                    S = np.zeros((K, V))
                S = np.exp(g[b, t, h])[:, None] * S
                S = S + beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h] - S.T @ k[b, t, h])
                out[b, t, h] = S.T @ q[b, t, h]
            last[b, h] = S
    return out, last


def close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5)


run = jax.jit(delta_rule, static_argnames="chunk")


@pytest.mark.parametrize("decay", [0.01, 1.0, 60.0])  # 60: a product of exp(G) with exp(-G) would overflow
def test_chunks_are_the_recurrence(decay):
    given = inputs(decay=decay)
    close(run(*given, chunk=8), recurrence(*given))


def test_segments_begin_with_an_empty_state():
    """Boundaries within chunks, at their edges, and two in one chunk."""
    given = inputs(1, decay=0.1)
    segments = np.stack([np.repeat([1, 2, 3, 4], [16, 3, 17, 5]), np.repeat([1, 2, 0], [2, 4, 35])])
    close(run(*given, segments=jnp.array(segments), chunk=8), recurrence(*given, segments))


def test_rows_go_on_from_their_state_and_padding_changes_nothing():
    """Twenty positions, five that do not count, then one by one."""
    given = inputs(2, decay=0.1)
    want, last = recurrence(*given)
    padded = [np.concatenate([x[:, :20], 0 * x[:, :5] + (0 if n > 2 else 1)], axis=1) for n, x in enumerate(given)]
    out, state = run(*padded, chunk=8)
    np.testing.assert_allclose(out[:, :20], want[:, :20], atol=2e-6, rtol=1e-5)
    for t in range(20, T):
        out, state = run(*(x[:, t : t + 1] for x in given), state=state)
        np.testing.assert_allclose(out, want[:, t : t + 1], atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(state, last, atol=2e-6, rtol=1e-5)


def test_gradients_are_those_of_the_recurrence():
    given = inputs(3, decay=0.3)
    segments = jnp.array(np.stack([np.repeat([1, 2], [18, 23]), np.repeat([1, 2], [32, 9])]))
    first = jnp.concatenate([jnp.zeros((B, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    start = np.random.default_rng(4).normal(size=(B, H, K, V)).astype(np.float32)
    weight = np.random.default_rng(5).normal(size=(B, T, H, V)).astype(np.float32)

    def plain(q, k, v, g, beta, state):
        def step(S, x):
            q, k, v, g, beta, first = x
            S = jnp.where(first[:, None, None, None], 0, S) * jnp.exp(g)[..., None]
            S += (beta[..., None] * k)[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", S, k))[..., None, :]
            return S, jnp.einsum("bhkv,bhk->bhv", S, q)

        state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, g, beta, first)))
        return out.swapaxes(0, 1), state

    def loss(form):
        def scalar(*given):
            out, state = form(*given)
            return (out * weight).sum() + jnp.sin(state).sum()

        return jax.jit(jax.grad(scalar, argnums=tuple(range(6))))(*given, start)

    chunks = loss(lambda *x: delta_rule(*x[:5], segments, x[5], chunk=8))
    for got, want in zip(chunks, loss(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)
