"""What GLM-5.3-Flash's decoder cannot do is said; its parameters have a place on a mesh, continuations of a prompt
its cache. Numbers are compared in tests/interop/test_glm5_next.py; how it runs on several devices is not tested.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from glmv_jax import models, presets
from glmv_jax.models import build, vlm
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import TokenInput, UserError

SIZES = dict(
    kind="glm5_next", vocab=64, depth=8, width=32, heads=4, q_rank=16, kv_rank=16, nope_dim=8, v_dim=8, index_heads=4,
    index_dim=8, top_k=8, linear_heads=4, linear_dim=8, mlp=48, expert_mlp=16, experts=8, chosen=2,
)  # fmt: skip


def config() -> vlm.VLMConfig:
    return build.vlm(ConfigDict({"vision": presets.VISION["nano"], "decoder": SIZES, "mtp": {"depth": 1}}))


def reads(cfg: vlm.VLMConfig, branches=None) -> None:
    """Traced, not compiled."""
    ones = jnp.ones((1, 8), jnp.int32)
    tokens = TokenInput(ones, jnp.zeros((1, 8, 3), jnp.int32), ones, -ones, branches=branches)
    jax.eval_shape(lambda params: vlm.apply(cfg, params, None, tokens), models.abstract_params(cfg))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
def test_parameters_have_a_place_on_a_mesh():
    cfg = config()
    assert [len(unit.layers) * times for unit, times in cfg.decoder.stacks] == [4, 4]
    mesh = mesh_lib.make_mesh({"fsdp": 4, "tensor": 2})
    rules_lib.preset("fsdp_tensor").shardings(mesh, models.logical_axes(cfg), models.abstract_params(cfg))


def test_branches_are_refused():
    reads(config())
    with pytest.raises(UserError, match="pack every answer with its own prompt"):
        reads(config(), branches=jnp.zeros((1, 8), jnp.int32))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 (emulated) devices")
def test_rows_over_devices_are_refused():
    mesh = mesh_lib.make_mesh({"context": 2}, jax.devices()[:2])
    with rules_lib.use(mesh, rules_lib.preset("context")), pytest.raises(UserError, match="without the axis context"):
        reads(config())


def test_prompts_are_copied_for_their_continuations():
    """Every leaf of a prompt's cache, with room for five more tokens where it has slots, or pools of them."""
    cfg = config()
    cache = vlm.init_cache(cfg, 2, 10) | {"length": jnp.array([10, 7])}
    rng = np.random.default_rng(0)
    cache["layers"] = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), cache["layers"])
    shared = vlm.share_prompts(cfg, cache, 2, 5)
    assert shared["slots"].tolist() == list(range(15)) and shared["length"].tolist() == [10, 10, 7, 7]
    want = jax.tree.map(jnp.shape, vlm.init_cache(cfg, 4, 15)["layers"])
    assert jax.tree.map(jnp.shape, shared["layers"]) == want
    for x, y in zip(jax.tree.leaves(cache["layers"]), jax.tree.leaves(shared["layers"]), strict=True):
        for row in range(4):
            np.testing.assert_array_equal(y[:, row, : x.shape[2]], x[:, row // 2])
            assert not np.any(y[:, row, x.shape[2] :])
