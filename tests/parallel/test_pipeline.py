"""A decoder on the stages of a pipeline: the numbers of one device, and what crosses between stages.

Not covered: real links, whose speed no emulated device has; bfloat16.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax import models
from glmv_jax.aot.crossing import bytes_across
from glmv_jax.models import glm4_moe, vlm
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import pipeline
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import TokenInput, UserError, VisionInput
from tests.random_params import random_params

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")


B, T, D = 8, 12, 32
SIZES = dict(vocab=64, width=D, heads=4, kv_heads=2, head_dim=8, mlp=64)
VISION = models.CogViTConfig(depth=1, width=32, heads=4, mlp=64, patch=4)


def config(option="image_token", remat="none", depth=8, mtp=2) -> models.VLMConfig:
    decoder = models.DecoderConfig(**SIZES, depth=depth, rope_split=(1, 1, 2), remat=remat)
    head = models.MTPConfig(decoder, mtp, option) if mtp else None
    return models.VLMConfig(VISION, models.MergerConfig(32, D, 96), decoder, head)


def text(cfg: models.VLMConfig) -> models.VLMConfig:
    """The decoder alone, which compiles in half the time."""
    return models.VLMConfig(None, None, cfg.decoder)


def batch(cfg: models.VLMConfig) -> tuple[VisionInput | None, TokenInput]:
    """Eight rows for `cfg`: two documents each, cut at different places, the first with an image, then padding."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:4, 0:4]
    order = np.stack([y, x], -1).reshape(2, 2, 2, 2, 2).transpose(0, 2, 1, 3, 4).reshape(16, 2)
    patches = rng.normal(size=(B, 16, VISION.patch_dim)).astype(np.float32)
    vision = VisionInput(patches, np.broadcast_to(order, (B, 16, 2)), np.ones((B, 16), np.int32))
    at = np.broadcast_to(np.arange(T), (B, T))
    cut = rng.integers(6, 9, (B, 1))
    segments = np.where(at < cut, 1, np.where(at < rng.integers(10, T + 1, (B, 1)), 2, 0))
    image_row = np.where((at >= 2) & (at < 6) & (cfg.vision is not None), at - 2, -1)
    tokens = np.where(image_row >= 0, 63, rng.integers(1, 60, (B, T)))
    positions = np.repeat(np.where(at < cut, at, at - cut)[..., None], 3, -1)
    rows = TokenInput(tokens, positions, segments, image_row, (segments > 0).astype(np.float32))
    return vision if cfg.vision else None, rows


def loss(cfg: models.VLMConfig, params, rows):
    """Of all heads; each position says what it can of its own token, which does for a gradient everywhere."""
    vision, tokens = rows
    out = vlm.apply(cfg, params, vision, tokens)
    tokens = pipeline.on_last(tokens)
    hidden = [out.hidden]
    if cfg.mtp:
        hidden += vlm.mtp_hidden(cfg, params, out, tokens)[0]
    said = sum(jax.nn.log_softmax(vlm.logits(cfg, params, h_BTD)) for h_BTD in hidden)
    picked_BT = jnp.take_along_axis(said, tokens.tokens[..., None], -1)[..., 0]
    total = -(picked_BT * tokens.loss_weight).sum() / jnp.maximum(tokens.loss_weight.sum(), 1)
    return total, out.aux


def on(sizes, preset, **schedule):
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    return mesh, dataclasses.replace(rules_lib.preset(preset), **schedule)


def placed(cfg, params, mesh, rules):
    """Parameters, which may be shapes alone, and the rows, where they live."""
    where = rules.shardings(mesh, models.logical_axes(cfg), models.abstract_params(cfg))
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    params = jax.tree.map(put, params, where) if abstract else jax.device_put(params, where)
    return params, jax.device_put(batch(cfg), rules_lib.batch_sharding(mesh))


def differentiated(cfg, mesh, rules, params, rows):
    """The compiled gradient of the loss."""
    with rules_lib.use(mesh, rules):
        return jax.jit(jax.value_and_grad(functools.partial(loss, cfg), has_aux=True)).lower(params, rows).compile()


@functools.cache
def alone(cfg):
    params = random_params(cfg)
    return params, jax.jit(jax.value_and_grad(functools.partial(loss, cfg), has_aux=True))(params, batch(cfg))


def assert_same(cfg, sizes, preset, **schedule):
    params, ((want, want_aux), want_grads) = alone(config() if cfg.vision else text(config()))
    mesh, rules = on(sizes, preset, **schedule)
    given = placed(cfg, params, mesh, rules)
    program = differentiated(cfg, mesh, rules, *given)
    (value, aux), grads = program(*given)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), aux, want_aux)

    def close(path, a, b):
        error = np.linalg.norm(np.asarray(a) - b) / max(np.linalg.norm(b), 1e-6)
        assert error <= 1e-4, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(close, grads, want_grads)
    return given[0], program.as_text(), mesh


@pytest.mark.parametrize("stages, repeats, microbatches", [(2, 1, 2), (2, 2, 4), (3, 2, 6), (4, 2, 4), (4, 3, 8)])
def test_every_piece_is_done_once_and_handed_on_at_once(stages, repeats, microbatches):
    """Against a simulation of what each stage holds."""
    plan = pipeline.Schedule(stages, repeats, microbatches)
    done = {m: 0 for m in range(microbatches)}  # pieces that a microbatch has been through
    handed = {}
    for step in range(plan.steps):
        sent = {}
        for stage in range(stages):
            repeat, m = (int(n) for n in plan.item(step, stage))
            if not 0 <= step - stage < plan.work:
                continue
            assert done[m] == repeat * stages + stage
            assert (stage, repeat) == (0, 0) or handed[stage] == m
            done[m] += 1
            sent[(stage + 1) % stages] = m
        handed = sent
    assert set(done.values()) == {stages * repeats}
    idle = plan.steps * stages - sum(done.values())
    assert plan.bubble == pytest.approx(idle / (plan.steps * stages))


@pytest.mark.parametrize(
    "cfg, sizes, preset, schedule",
    [
        (config(), {"stage": 2}, "data", dict()),
        (config(remat="dots"), {"stage": 4, "data": 2}, "data", dict()),
        (config(), {"stage": 2, "data": 2}, "data", dict(ends="stages")),
        (text(config(remat="full")), {"stage": 4}, "data", dict(repeats=2, microbatches=8)),
        (text(config(remat="full")), {"stage": 2, "fsdp": 2}, "fsdp", dict(repeats=4)),
        (text(config()), {"stage": 2, "fsdp": 2, "tensor": 2}, "fsdp_tensor", dict(repeats=2)),
    ],
    ids=lambda value: ",".join(f"{k}={n}" for k, n in value.items()) if isinstance(value, dict) else None,
)
def test_stages_compute_what_one_device_does(cfg, sizes, preset, schedule):
    """Packed documents, in the first three images and two depths of MTP; a permute over `stage`, and a stage's layers
    on its devices."""
    params, program, mesh = assert_same(cfg, sizes, preset, **schedule)
    assert bytes_across(program, mesh, "stage")["collective-permute"] > 0
    S = sizes["stage"]
    kernel = params["decoder"]["blocks"]["mlp"]["gate"]["kernel"]
    assert all(x.sharding.shard_shape(x.shape)[0] == 8 // S for x in jax.tree.leaves(params["decoder"]["blocks"]))
    split = S if preset == "data" else mesh.size
    assert kernel.addressable_shards[0].data.nbytes == kernel.nbytes / split


def test_layers_before_the_long_run_stay_outside_and_experts_report_in_order():
    """GLM-4.5's kind: one dense layer, then four with experts, whose loads and losses come back a layer."""
    decoder = glm4_moe.GLM4MoEConfig(
        **SIZES, depth=5, dense=1, expert_mlp=16, experts=8, chosen=2, rope_split=(1, 0, 1), qk_norm=True
    )
    cfg = models.VLMConfig(None, None, decoder)
    params, rows = random_params(cfg), batch(cfg)

    def both(params, rows):
        value, aux = loss(cfg, params, rows)
        return value + aux["blocks1"]["balance"].mean(), aux

    gradient = jax.value_and_grad(both, has_aux=True)
    (want, want_aux), want_grads = jax.jit(gradient)(params, rows)
    assert len(np.unique(np.asarray(want_aux["blocks1"]["load"]), axis=0)) == 4  # layers can be told apart
    mesh, rules = on({"stage": 2, "data": 2}, "fsdp_tensor", repeats=2)
    where = rules.shardings(mesh, models.logical_axes(cfg), models.abstract_params(cfg))
    assert where["decoder"]["blocks0"]["mlp"]["gate"]["kernel"].spec[0] is None
    with rules_lib.use(mesh, rules):
        many = jax.jit(gradient)(jax.device_put(params, where), jax.device_put(rows, rules_lib.batch_sharding(mesh)))
    (value, aux), grads = many
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), aux, want_aux)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


def test_what_does_not_fit_is_named():
    rows = batch(config())

    def trace(cfg, sizes, cache=None, rows=rows, **schedule):
        mesh, rules = on(sizes, "data", **schedule)
        with rules_lib.use(mesh, rules):
            jax.eval_shape(lambda p: vlm.apply(cfg, p, None, rows[1], cache).hidden, models.abstract_params(cfg))

    with pytest.raises(UserError, match=r"8 layers are too few for stage=2 x pipeline.repeats=5; .* be 8 at most"):
        trace(config(), {"stage": 2}, repeats=5)
    with pytest.raises(UserError, match="microbatches=3, which must be a multiple of 2"):
        trace(config(), {"stage": 2}, microbatches=3)
    with pytest.raises(UserError, match="8 rows over 4 data shards .*microbatches=4, which"):
        trace(config(), {"stage": 2, "data": 4}, microbatches=4)
    with pytest.raises(UserError, match="not decoded through a pipeline"):
        cfg = config()
        trace(cfg, {"stage": 2}, cache=vlm.init_cache(cfg, B, T))
    with pytest.raises(UserError, match="pipeline.ends='middle'"):
        on({"stage": 2}, "data", ends="middle")


def test_the_image_token_adds_nothing_between_first_and_last_stage():
    """The reason of GLM-5V-Turbo, section 2.2, for its third option, seen in the compiled program of a forward pass:
    with heads on the last stage, `embeddings` needs there what entered the backbone, tokens x width x 4 bytes, and
    `image_token` ids and positions alone. Where rows of the ends are split over stages nothing crosses for either."""

    def crossing(option, ends):
        cfg = config(option or "image_token", mtp=2 if option else 0)
        mesh, rules = on({"stage": 2, "data": 2}, "data", ends=ends)
        given = placed(cfg, models.abstract_params(cfg), mesh, rules)
        with rules_lib.use(mesh, rules):
            text = jax.jit(functools.partial(loss, cfg)).lower(*given).compile().as_text()
        return collections.Counter(bytes_across(text, mesh, "stage"))

    none, token, embeddings = (crossing(option, "stages") for option in (None, "image_token", "embeddings"))
    assert embeddings - token == {"collective-permute": B * T * D * 4}
    # An id and three positions a token, which come from where their rows were: half of them by a permute.
    assert token - none == {"collective-permute": B * T * 4 * 4, "all-to-all": B * T * 4 * 4}
    assert crossing("embeddings", "rows") == crossing(None, "rows")
