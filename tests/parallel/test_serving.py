"""The rules "serve": on a mixture of experts a token of eight devices is that of one, and no parameter is gathered. And
caches lie by heads.

Whole answers of a dense decoder are tests/inference/test_engine.py's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax import models
from glmv_jax.kernels import attention
from glmv_jax.kernels.span import Span
from glmv_jax.models import block, vlm
from glmv_jax.models.glm5 import GLM5Config
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import TokenInput
from tests.parallel.collectives import collectives

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
B, SLOTS = 4, 12
CFG = models.VLMConfig(None, None, GLM5Config(
    vocab=96, depth=2, width=32, heads=4, q_rank=24, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8, index_heads=2,
    index_dim=8, top_k=6, mlp=48, dense=1, expert_mlp=40, experts=8, chosen=2, rope_split=(1, 1, 2),
), None)  # fmt: skip


def step(params, cache, token_B):
    """(logits, cache) of a row's next token."""
    at_B13 = jnp.broadcast_to(cache["length"][:, None, None], (B, 1, 3))
    ones_B1 = jnp.ones((B, 1), jnp.int32)
    out = vlm.apply(CFG, params, None, TokenInput(token_B[:, None], at_B13, ones_B1, -ones_B1), cache)
    return vlm.logits(CFG, params, out.hidden), out.cache


def compiled(*args):
    return jax.jit(step).lower(*args).compile({"xla_backend_optimization_level": 0})


def test_a_token_gathers_no_parameter():
    rng = np.random.default_rng(0)
    cache = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), vlm.init_cache(CFG, B, SLOTS))
    cache |= {"slots": np.arange(SLOTS), "length": rng.integers(1, SLOTS, B).astype(np.int32)}
    number = lambda x: (rng.normal(size=x.shape) * x.shape[-2 if x.ndim > 1 else -1] ** -0.5).astype(np.float32)  # noqa: E731
    args = jax.tree.map(number, models.abstract_params(CFG)), cache, rng.integers(0, 96, B).astype(np.int32)
    want = compiled(*args)(*args)

    mesh, rules = mesh_lib.make_mesh({"expert": 4, "tensor": 2}), rules_lib.preset("serve")
    shardings = rules.shardings(mesh, models.logical_axes(CFG), models.abstract_params(CFG))
    params, token = jax.device_put(args[0], shardings), jax.device_put(args[2], rules_lib.batch_sharding(mesh))
    with rules_lib.use(mesh, rules):
        program = compiled(params, cache, token)
    got = program(params, *jax.device_put((cache, token), program.input_shardings[0][1:]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())

    gate = params["decoder"]["blocks1"]["layer0"]["moe"]["gate"]
    assert gate.shape == (1, 8, 32, 40) and gate.sharding.shard_shape(gate.shape) == (1, 2, 32, 20)
    found = collectives(program)
    assert {c.kind for c in found} >= {"all-to-all", "all-reduce"}, "rows to experts, sums over tensor"
    least = 24 * 8  # numbers of the smallest matrix
    assert not [c for c in found if c.kind == "all-gather" and c.size >= least], found


def test_keys_that_answers_have_in_common_lie_by_heads():
    """Prompts written at once, read by two answers of each, which write at places of their own."""
    N, G, H, K, S, T = 4, 4, 8, 8, 5, 3  # two prompts a data shard: else both orders are one
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    keys, own, q = (draw(2, N, S, G, K), draw(2, 2 * N, 1, G, K), draw(2 * N, 1, H, K))
    valid = np.arange(S) < np.array([[5], [3], [4], [1]])
    at = rng.integers(0, T, (2 * N, 1))

    def answered(keys, own, q, valid, at):
        prompt = {n: block.write(jnp.zeros((N * G, S, K)), x, jnp.arange(S)[None]) for n, x in zip("kv", keys)}
        cache = [block.write(jnp.zeros((2 * N * G, T, K)), x, at) for x in own]
        query, key = Span(jnp.ones_like(at), at), Span(jnp.ones((1, T), jnp.int32), jnp.arange(T)[None])
        return attention.cached(q, *cache, query, key, block.as_prompt(prompt, valid)), cache

    want, _ = jax.jit(answered)(keys, own, q, valid, at)
    mesh = mesh_lib.make_mesh({"data": 2, "tensor": 4})
    with rules_lib.use(mesh, rules_lib.preset("serve")):
        got, cache = jax.jit(lambda *args: answered(*args))(keys, own, q, valid, at)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert all(x.sharding.shard_shape(x.shape) == (2 * N * G // 8, T, K) for x in cache)
