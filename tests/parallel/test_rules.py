"""Meshes and rules: loud about mistakes, and the same numbers on 1 and on 8 devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glmv_jax import models, presets
from glmv_jax.models import build, two_tower, vlm
from glmv_jax.parallel import caches, context
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import TokenInput, UserError, VisionInput
from tests.random_params import random_params

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="embd"):
        rules_lib.Rules({"embd": "fsdp"})
    mesh = mesh_lib.make_mesh({"data": -1}, jax.devices()[:1])
    with pytest.raises(ValueError, match="heds"):
        rules_lib.PRESETS["data"].spec(("heds",), mesh)
    with pytest.raises(UserError, match="tensr"):
        mesh_lib.make_mesh({"tensr": 1})
    with pytest.raises(UserError, match="fspd"):
        rules_lib.preset("fspd")


def test_what_needs_a_mesh_says_so_outside_of_a_step():
    with pytest.raises(RuntimeError, match="no mesh is in force"):
        context.spec("batch", "length")


@needs_8
def test_colliding_names_raise():
    mesh = mesh_lib.make_mesh({"fsdp": 8})
    with pytest.raises(ValueError, match="both land on mesh axis 'fsdp'"):
        rules_lib.Rules({"embed": "fsdp", "mlp": "fsdp"}).spec(("embed", "mlp"), mesh)
    assert rules_lib.PRESETS["fsdp"].spec(("layers", "embed", "mlp"), mesh) == P(None, "fsdp", None)


@needs_8
def test_presets_are_every_choice_of_what_splits_parameters():
    names = {"data", "fsdp", "expert", "tensor", "fsdp_expert", "fsdp_tensor", "expert_tensor", "fsdp_expert_tensor"}
    assert names <= set(rules_lib.PRESETS)
    mesh = mesh_lib.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    rules = rules_lib.preset("fsdp_expert_tensor")
    assert rules.spec(("layers", "expert", "expert_embed", "mlp"), mesh) == P(None, "expert", "fsdp", "tensor")
    assert rules.spec(("expert", "expert_mlp", None), mesh) == P("expert", ("tensor", "fsdp"), None)
    assert rules.spec(("embed", "heads"), mesh) == P(("fsdp", "expert"), "tensor")
    assert rules.spec(("batch", "length"), mesh) == P(("fsdp", "expert"), None)
    assert rules_lib.preset("fsdp_tensor").spec(("expert", "expert_embed", "mlp"), mesh) == P(None, "fsdp", "tensor")
    serve = rules_lib.preset("serve")  # matrices are read where they lie
    assert serve.spec(("layers", "expert", "expert_embed", "mlp"), mesh) == P(None, "expert", None, "tensor")
    assert serve.spec(("embed", "heads"), mesh) == P(None, "tensor") and serve.spec(("vocab", "embed"), mesh)[1] is None
    assert serve.spec(("batch", "length"), mesh) == P(("fsdp", "expert"), None)
    assert caches.spec(mesh, serve) == P(("fsdp", "expert", "tensor"))
    with pytest.raises(UserError, match="3 heads of keys .* 2 devices, over 1 they do"):
        caches.check(3, caches.parts((mesh, serve)))
    with pytest.raises(UserError, match="'tensor_fsdp' is not known; choose data, or join .* as in .*_tensor"):
        rules_lib.preset("tensor_fsdp")


@needs_8
def test_mesh_and_batch_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="needs 6 devices but 8"):
        mesh_lib.make_mesh({"data": 6})
    with pytest.raises(UserError, match="batch=60 does not divide over 8 data shards; try 64"):
        mesh_lib.check_batch(60, mesh_lib.make_mesh({"data": 8}))
    with pytest.raises(UserError, match=r"head_test \(12,\).* 8 devices \(tensor\), over 4 it does; give mesh.data"):
        mesh = mesh_lib.make_mesh({"tensor": 8})
        rules_lib.PRESETS["fsdp_tensor"].shardings(
            mesh, {"head_test": ("heads",)}, {"head_test": jax.ShapeDtypeStruct((12,), jnp.float32)}
        )


def vlm_case():
    cfg = build.vlm(presets.vlm("nano"))
    rng = np.random.default_rng(0)
    B, T, Pn = 8, 12, 16
    yx = np.broadcast_to(np.stack(np.mgrid[0:4, 0:4], -1).reshape(16, 2), (B, Pn, 2))
    vision = VisionInput(rng.normal(size=(B, Pn, 384)).astype(np.float32), yx, np.ones((B, Pn), np.int32))
    image_row = np.full((B, T), -1)
    image_row[:, 2:6] = np.arange(4)
    positions = np.broadcast_to(np.arange(T)[None, :, None], (B, T, 3))
    tokens = TokenInput(rng.integers(1, 4000, (B, T)), positions, np.ones((B, T), np.int32), image_row)

    def loss(params, batch):
        out = vlm.apply(cfg, params, *batch)
        hidden = [out.hidden, *vlm.mtp_hidden(cfg, params, out, batch[1])[0]]
        return sum(jnp.mean(jax.nn.logsumexp(vlm.logits(cfg, params, h), -1)) for h in hidden)

    return cfg, loss, (vision, tokens)


def two_tower_case():
    cfg = build.two_tower(presets.two_tower("nano"))
    _, _, (vision, tokens) = vlm_case()

    def loss(params, batch):
        out = two_tower.apply(cfg, params, *batch, 2)
        logits_NBB = jnp.einsum("be,cne->nbc", out.image, out.text)
        return jnp.mean(jax.nn.softplus(jnp.exp(out.log_scale) * logits_NBB + out.bias))

    segments = np.broadcast_to(1 + (np.arange(tokens.tokens.shape[1]) > 3), tokens.tokens.shape)
    return cfg, loss, (vision, tokens.tokens, segments)


@functools.cache
def alone(case):
    """What one device makes of it: (parameters, loss, gradients)."""
    cfg, loss, batch = case()
    params = random_params(cfg)
    return params, *jax.jit(jax.value_and_grad(loss))(params, batch)


@needs_8
@pytest.mark.parametrize("case", [vlm_case, two_tower_case])
@pytest.mark.parametrize(
    "preset,sizes", [("fsdp", {"data": 2, "fsdp": 4}), ("fsdp_tensor", {"fsdp": 4, "tensor": 2})]
)
def test_one_and_eight_devices_agree(case, preset, sizes):
    """Loss and every gradient of the nano model, to 1e-5, under each preset. Batches split over the data axes."""
    cfg, loss, batch = case()
    params, one, one_grads = alone(case)
    mesh, rules = mesh_lib.make_mesh(sizes), rules_lib.preset(preset)
    shardings = rules.shardings(mesh, models.logical_axes(cfg), models.abstract_params(cfg))
    placed = jax.device_put(params, shardings)
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
    rows = jax.device_put(batch, rules_lib.batch_sharding(mesh))
    with rules_lib.use(mesh, rules):
        many, many_grads = jax.jit(jax.value_and_grad(loss))(placed, rows)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one_grads, many_grads)


@needs_8
def test_init_lands_sharded():
    cfg = build.vision(presets.vision("nano"))
    mesh, rules = mesh_lib.make_mesh({"fsdp": 8}), rules_lib.preset("fsdp")
    shardings = rules.shardings(mesh, models.logical_axes(cfg), models.abstract_params(cfg))
    params = models.init_params(cfg, jax.random.key(0), shardings)
    kernel = params["blocks"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 128 // 8, 352)
    np.testing.assert_array_equal(kernel, models.init_params(cfg, jax.random.key(0))["blocks"]["mlp"]["gate"]["kernel"])
