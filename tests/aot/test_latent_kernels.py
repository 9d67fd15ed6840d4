"""Latent attention with its indexer compiled for described TPUs, forward, backward and with the indexer's loss."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from glmv_jax.aot import costs, hlo, topology
from glmv_jax.kernels import latent_attention as lib
from glmv_jax.kernels import lightning
from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.parallel import context
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.rules import preset, use

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'glmv_jax[tpu]'"
)
B, T, H, N, R, C, V, J, K = 2, 8192, 4, 192, 64, 512, 256, 32, 128  # GLM-5's widths, fewer heads of attention


@needs_libtpu
def test_no_scores_in_memory():
    """On each device five kernels, whose authors' FLOPs are those of the pairs on and under the diagonal, and no array
    as large as the scores of all heads."""
    mesh = make_mesh({"data": 2}, topology.parse("v5p:2x2x1").devices[:2])
    with use(mesh, preset("data")):

        def array(*shape, dtype=jnp.bfloat16):
            names = ("batch", "length") if shape[:2] == (B, T) else ()
            where = NamedSharding(mesh, context.spec(*names, *[None] * (len(shape) - len(names))))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        heads = lib.Heads(array(B, T, H, N), array(B, T, H, R), array(C, H, N), array(C, H, V))
        index = lib.Index(array(B, T, J, K), array(B, T, J, dtype=jnp.float32), array(B, T, K))
        span = Span(*[array(B, T, dtype=jnp.int32)] * 2, in_order=IN_ORDER)

        def loss(heads, latents, index, span):
            looked = lib.latent_attention(heads, latents, span, span, index, top_k=2048, with_loss=True)
            return looked.out.astype(jnp.float32).sum() + looked.loss.sum()

        latents = lib.Latents(array(B, T, C), array(B, T, R))
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads, latents, index, span).compile().as_text()
    found = costs.schedule(hlo.parse(text))
    steps = [s for s in found.steps if 'custom_call_target="tpu_custom_call"' in s.op.attributes]
    kernels = [costs.flops_of(found.module, step) for step in steps]
    blocks = T // 512
    pairs = B * T * T * (blocks + 1) / (2 * blocks) / 2
    attention, indexer = H * (2 + 3 + 4 + 1) * 256, (1 + 3) * J * K
    assert len(kernels) == 5 and sum(kernels) == pytest.approx(2 * pairs * (attention + indexer), rel=1e-6)
    largest = max(array.bytes for line in text.splitlines() if " = " in line for array in hlo.arrays(line))
    assert largest <= 4 * B * T * T < 4 * B * H * T * T


@needs_libtpu
@pytest.mark.parametrize("chips", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_rows_of_128k_fit_vector_memory(chips):
    """What the indexer's kernels hold of a row's keys; the compiler refuses a kernel that asks for too much."""
    where = jax.sharding.SingleDeviceSharding(topology.parse(chips).devices[0])
    T, S, H = 512, 1 << 17, 1

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def loss(index, q, k, total, span, key):
        chosen = lightning.choose(index, span, key, 2048)
        return lightning.loss(index, q, k, total, chosen, span.slots).sum()

    index = lib.Index(array(1, T, J, K), array(1, T, J, dtype=jnp.float32), array(1, S, K))
    span, key = (Span(*[array(1, n, dtype=jnp.int32)] * 2, in_order=IN_ORDER) for n in (T, S))
    heads = array(1, H, T, N + R), array(1, H, S, N + R), array(1, H, T, dtype=jnp.float32)
    text = jax.jit(jax.value_and_grad(loss)).lower(index, *heads, span, key).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
