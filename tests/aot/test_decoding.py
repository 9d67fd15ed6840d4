"""A token compiled for a described TPU: caches stay where they are."""

from __future__ import annotations

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from glmv_jax.aot import topology
from glmv_jax.kernels.span import Span
from glmv_jax.models import decoder
from glmv_jax.models.decoder import DecoderConfig
from glmv_jax.models.glm5 import GLM5Config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'glmv_jax[tpu]'"
)
N, S = 8, 8192
DENSE = DecoderConfig(vocab=512, depth=4, width=512, heads=4, kv_heads=2, head_dim=128, mlp=512, dtype="bfloat16")
SPARSE = GLM5Config(
    vocab=512, depth=4, width=512, heads=4, mlp=512, dense=4, expert_mlp=128, experts=4, q_rank=256, kv_rank=512,
    index="FSFS", top_k=512, dtype="bfloat16",
)  # fmt: skip


@needs_libtpu
@pytest.mark.parametrize("cfg", [DENSE, SPARSE], ids=["heads", "latents"])
def test_caches_are_written_in_place(cfg):
    """No copy of what all layers keep, nor room for what one of them does."""
    where = jax.sharding.SingleDeviceSharding(topology.parse("v5p:2x2x1").devices[0])
    put = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where))

    def token(params, cache, x_ND, at_N):
        query = Span(jnp.ones((N, 1), jnp.int32), at_N[:, None])
        key = Span(jnp.ones((N, S), jnp.int32), jnp.arange(S)[None])
        positions = jnp.broadcast_to(at_N[:, None, None], (N, 1, 3))
        out = decoder.apply(cfg, params, x_ND[:, None], positions, query, key, cache)
        return out.cache, out.hidden

    cache = jax.eval_shape(lambda: cfg.init_cache(N, S))
    params = jax.eval_shape(lambda: cfg.module().init(jax.random.key(0), *cfg.example())["params"])
    x, at = jax.ShapeDtypeStruct((N, cfg.width), jnp.bfloat16), jax.ShapeDtypeStruct((N,), jnp.int32)
    compiled = jax.jit(token, donate_argnums=1).lower(*map(put, (params, cache, x, at))).compile()
    held = {x.shape: x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.temp_size_in_bytes < max(size / shape[0] for shape, size in held.items())
    for shape in held:
        assert not re.search(rf"= bf16\[{','.join(map(str, shape))}\]\S* copy\(", text), shape
