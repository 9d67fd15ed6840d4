"""Attention compiled for described TPUs: kernels on each device's rows and heads, and no scores in memory."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from glmv_jax.aot import costs, hlo, topology
from glmv_jax.kernels.attention import attention
from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.parallel import context
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.rules import preset, use

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'glmv_jax[tpu]'"
)


def largest(text: str) -> int:
    """Numbers of the largest array."""
    sizes = [array.bytes // 2 for line in text.splitlines() if " = " in line for array in hlo.arrays(line)]
    return max(sizes)


@needs_libtpu
@pytest.mark.parametrize(
    ("axes", "causal", "T", "heads", "groups", "K", "marked"),
    [
        ({"data": 2, "tensor": 2}, False, 16384, 16, 16, 64, True),  # a row of CogViT's longest
        ({"data": 2, "tensor": 2}, True, 8192, 16, 4, 128, True),
        ({"data": 2, "context": 2}, True, 8192, 16, 4, 128, True),
        ({"data": 2, "tensor": 2}, True, 2048, 16, 4, 128, False),
    ],
)
def test_no_scores_in_memory(axes, causal, T, heads, groups, K, marked):
    B = 2
    mesh = make_mesh(axes, topology.parse("v5e:2x2").devices)
    with use(mesh, preset("tensor" if "tensor" in axes else "context")):

        def array(shape, names, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, context.spec(*names)))

        row = array((B, T), ("batch", "length"), jnp.int32)
        span = Span(row, row if causal else None, in_order=IN_ORDER if marked else None)
        q = array((B, T, heads, K), ("batch", "length", "heads", None))
        kv = array((B, T, groups, K), ("batch", "length", "kv_heads", None))

        def loss(q, k, v, span):
            return attention(q, k, v, span, span).astype(jnp.float32).sum()

        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, span).compile().as_text()
    a_row = T * heads * max(K, 128) * 4  # float32, and what a device has of the batch's rows and heads at most
    if marked:
        assert text.count('custom_call_target="tpu_custom_call"') == 3, "forward, and two products' backward"
        assert largest(text) <= a_row
        found = costs.schedule(hlo.parse(text))
        counted = sum(step.times * costs.flops_of(found.module, step) for step in found.steps)
        blocks = T // 512
        pairs = T * T * ((blocks + 1) / (2 * blocks) if causal else 1)
        assert counted == pytest.approx((2 + 3 + 4) * 2 * B * heads * pairs * K / 4, rel=1e-6)  # on each of 4 devices
    else:
        assert "tpu_custom_call" not in text and largest(text) > T * T
