"""Latent attention and its indexer against float64 NumPy and against each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import latent_attention as lib
from glmv_jax.kernels.span import Span

B, T, S, H, N, R, C, V, J, K = 2, 8, 8, 3, 5, 4, 6, 7, 4, 6


def inputs(seed: int = 0, T: int = T):
    rng = np.random.default_rng(seed)
    f32 = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)  # noqa: E731
    heads = lib.Heads(f32(B, T, H, N), f32(B, T, H, R), f32(C, H, N), f32(C, H, V))
    index = lib.Index(f32(B, T, J, K), f32(B, T, J), f32(B, S, K))
    key = Span(jnp.array([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2]), jnp.broadcast_to(jnp.arange(S), (B, S)))
    query = Span(*(x[:, S - T :] for x in key[:2]))
    return heads, lib.Latents(f32(B, S, C), f32(B, S, R)), query, key, index


def by_hand(heads, latents, query, key, index, top_k):
    """(out, weights, scores, allowed) in float64, a query and head at a time."""
    q, r, uk, uv, c, rk = (np.asarray(a, np.float64) for a in (*heads, *latents))
    iq, iw, ik = (np.asarray(a, np.float64) for a in index[:3])
    out, weights = np.zeros((B, q.shape[1], H, V)), np.zeros((B, H, q.shape[1], S))
    scores, allowed = np.zeros((B, q.shape[1], S)), np.zeros((B, q.shape[1], S), bool)
    for b in range(B):
        for t in range(q.shape[1]):
            for s in range(S):
                scores[b, t, s] = sum(iw[b, t, j] * max(iq[b, t, j] @ ik[b, s], 0) for j in range(J)) / (J * K) ** 0.5
            seen = [
                s for s in range(S)
                if key.segments[b, s] == query.segments[b, t] and key.slots[b, s] <= query.slots[b, t]
            ]  # fmt: skip
            allowed[b, t, sorted(seen, key=lambda s, b=b, t=t: (-scores[b, t, s], s))[:top_k]] = True
            for h in range(H):
                logits = [q[b, t, h] @ (c[b, s] @ uk[:, h]) + r[b, t, h] @ rk[b, s] for s in range(S)]
                e = np.where(allowed[b, t], np.exp(np.array(logits) / (N + R) ** 0.5), 0)
                weights[b, h, t] = e / e.sum()
                out[b, t, h] = weights[b, h, t] @ (c[b] @ uv[:, h])
    return out, weights, scores, allowed


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("top_k", [3, S])
def test_both_forms_equal_numpy(form, top_k):
    args = inputs()
    want, weights, _, allowed = by_hand(*args, top_k)
    got, shares = getattr(lib, form)(*args[:2], jnp.array(allowed))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(shares, weights, atol=1e-6)


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("top_k", [3, S])
def test_whole_pass_with_its_loss(block, top_k):
    heads, latents, query, key, index = inputs(1)
    want, weights, scores, allowed = by_hand(heads, latents, query, key, index, top_k)
    got = lib.latent_attention(heads, latents, query, key, index, top_k=top_k, with_loss=True, block=block)
    np.testing.assert_allclose(got.out, want, atol=1e-5)
    target = weights.mean(1)
    log_q = np.where(allowed, scores, -np.inf)
    log_q = log_q - np.log(np.exp(log_q).sum(-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.where(target > 0, target * (np.log(target) - log_q), 0).sum(-1)
    np.testing.assert_allclose(got.loss, loss, atol=1e-5)


def test_blocks_have_the_same_gradient():
    heads, latents, query, key, index = inputs(2)
    weight = jnp.array(np.random.default_rng(3).normal(size=(B, T, H, V)), jnp.float32)

    def grads(block):
        def loss(heads, latents, index):
            looked = lib.latent_attention(heads, latents, query, key, index, top_k=3, with_loss=True, block=block)
            return (looked.out * weight).sum() + looked.loss.sum()

        return jax.grad(loss, (0, 1, 2))(heads, latents, index)

    for a, b in zip(jax.tree.leaves(grads(4)), jax.tree.leaves(grads(512))):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_loss_teaches_the_indexer_alone():
    heads, latents, query, key, index = inputs(4)

    def loss(heads, latents, index):
        return lib.latent_attention(heads, latents, query, key, index, top_k=3, with_loss=True).loss.sum()

    of_heads, of_latents, of_index = jax.grad(loss, (0, 1, 2))(heads, latents, index)
    assert not any(np.any(g) for g in jax.tree.leaves((of_heads, of_latents)))
    assert all(np.any(g) for g in jax.tree.leaves(of_index))


def test_one_query_gathers_what_it_sees():
    heads, latents, query, key, index = inputs(5, T=1)
    want, *_ = by_hand(heads, latents, query, key, index, 3)
    first = lib.latent_attention(heads, latents, query, key, index, top_k=3)
    np.testing.assert_allclose(first.out, want, atol=1e-5)
    assert first.selection.at.shape == (B, 3) and first.selection.mask is None
    again = lib.latent_attention(heads, latents, query, key, selection=first.selection, top_k=3)
    np.testing.assert_allclose(again.out, want, atol=1e-5)
    text = jax.jit(lambda *a: lib.latent_attention(*a, top_k=3).out).lower(heads, latents, query, key, index).as_text()
    assert f"tensor<{B}x3x{C}xf32>" in text


def test_ties_go_to_the_earlier_key():
    scores = jnp.array([[[1.0, 0.0, 2.0, 0.0, 0.0, 0.0]]])
    seen = jnp.array([[[True, False, True, True, True, True]]])
    np.testing.assert_array_equal(lib.select(scores, seen, 3), [[[True, False, True, True, False, False]]])
    np.testing.assert_array_equal(lib.select(scores, seen, 6), seen)
    few = jnp.array([[[True, True, False, False, False, False]]])
    np.testing.assert_array_equal(lib.select(scores, few, 3), few)


@pytest.mark.parametrize("k", [1, 5, 63, 64])
def test_the_kth_largest_number_is_that_of_a_sort(k):
    """Ties, zeros of both signs, infinities and numbers of every size."""
    rng = np.random.default_rng(k)
    x = rng.normal(size=(7, 3, 64)).astype(np.float32) * 10.0 ** rng.integers(-38, 38, (7, 3, 64)).astype(np.float32)
    x[0] = np.round(rng.normal(size=(3, 64)))
    x[1, :, :40], x[2, :, 3], x[3] = -np.inf, np.inf, -np.inf
    x[4] = rng.choice(np.float32([0.0, -0.0, 1e-45, -1e-45]), (3, 64))
    found = np.asarray(jax.jit(lib.kth_largest, static_argnums=1)(x, k))
    np.testing.assert_array_equal(found, np.sort(x, axis=-1)[..., [-k]])
