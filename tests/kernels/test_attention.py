"""Attention over segments against float64 NumPy, and cuDNN's kernel against its plain twin.

The second needs an NVIDIA GPU: JAX_PLATFORMS=cuda CUDA_VISIBLE_DEVICES=0 python -m pytest tests/kernels
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import attention as kernel
from glmv_jax.kernels.attention import attention
from glmv_jax.kernels.span import Span

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
SEGMENTS = np.array([[1] * 9 + [2] * 5 + [0] * 2, [1] * 16])


def inputs(dtype="float32", heads=4, groups=2, width=16, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: jnp.asarray(rng.normal(size=(2, 16, n, width)), dtype)  # noqa: E731
    return draw(heads), draw(groups), draw(groups)


def by_hand(q, k, v, mask_BTS):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(mask_BTS[:, None], np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("causal", [False, True])
def test_segments_by_hand(causal):
    q, k, v = inputs()
    slots = jnp.broadcast_to(jnp.arange(16), (2, 16)) if causal else None
    span = Span(jnp.asarray(SEGMENTS), slots)
    mask = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    if causal:
        mask &= np.tri(16, dtype=bool)
    with jax.default_matmul_precision("highest"):  # a GPU would multiply in TF32
        np.testing.assert_allclose(attention(q, k, v, span, span), by_hand(q, k, v, mask), atol=1e-5)


def test_the_fast_path_is_taken_only_where_it_can_be(monkeypatch):
    monkeypatch.setattr(kernel, "_fused_device", lambda: True)
    q, k, _ = inputs("bfloat16")
    assert kernel.supported(q, k)
    assert not kernel.supported(q.astype(jnp.float32), k.astype(jnp.float32))
    assert not kernel.supported(q[:, :1], k), "an odd number of queries"
    assert not kernel.supported(*(jnp.zeros((1, 2, 1, 136), jnp.bfloat16),) * 2), "heads of 136"


@needs_gpu
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_is_the_twin_forward_and_backward(causal):
    q, k, v = inputs("bfloat16", width=64)
    slots = jnp.broadcast_to(jnp.arange(16), (2, 16)) if causal else None
    span = Span(jnp.asarray(SEGMENTS), slots)
    weight = jax.random.normal(jax.random.key(1), q.shape)

    def total(path):
        def loss(q, k, v):
            out = path(q, k, v, span, span)
            return (out.astype(jnp.float32) * weight).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    assert kernel.supported(q, k)
    for got, want in zip(jax.tree.leaves(total(kernel.fused)), jax.tree.leaves(total(kernel.plain))):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
