"""Models with rows split over devices: loss, gradients and what blocks say are those of one device, for every MMTP
option; what collectives carry, read from the compiled program; and a step of stage 3.

Rows hold two documents, an image in each, and padding; images and a document's end lie across the edges of chunks.
Not covered: long rows, bfloat16, several hosts.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glmv_jax import config as config_lib
from glmv_jax import models
from glmv_jax.losses.chunked import head_loss
from glmv_jax.losses.select import predictors, select
from glmv_jax.models import vlm
from glmv_jax.models.glm5 import GLM5Config
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import main
from glmv_jax.train import state as state_lib
from glmv_jax.train.step import make_train_step
from glmv_jax.typing import TokenInput, UserError, VisionInput
from tests.models.test_vlm import DECODER, VISION, config
from tests.parallel.collectives import collectives
from tests.random_params import random_params

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
B, T, P = 6, 32, 32
GLM5 = GLM5Config(
    vocab=64, depth=3, width=32, heads=4, q_rank=24, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8, index_heads=2,
    index_dim=8, top_k=6, index="FSF", index_loss=True, mlp=48, dense=1, expert_mlp=16, experts=4, chosen=2,
    rope_split=(1, 1, 2),
)  # fmt: skip
LOSSES = ("balance", "index_loss")  # of what blocks say


def glm5() -> models.VLMConfig:
    return models.VLMConfig(None, None, GLM5, models.MTPConfig(GLM5, 1, "image_token"))


def batch(images: bool = True) -> tuple[VisionInput | None, TokenInput]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:4, 0:4]
    order = np.stack([y, x], -1).reshape(2, 2, 2, 2, 2).transpose(0, 2, 1, 3, 4).reshape(16, 2)
    patches = rng.normal(size=(B, P, VISION.patch_dim)).astype(np.float32)
    vision = VisionInput(patches, np.tile(order, (B, 2, 1)), np.tile(np.repeat([1, 2], 16), (B, 1)).astype(np.int32))
    image_row = np.full((B, T), -1)
    if images:
        image_row[:, 3:7], image_row[:, 17:21] = np.arange(4), np.arange(4, 8)
    ends = ((13, 29), (9, 32), (16, 32), (32, 32), (7, 30), (22, 32))
    segments = np.array([[1] * a + [2] * (b - a) + [0] * (T - b) for a, b in ends])
    tokens = np.where(image_row >= 0, 63, rng.integers(1, 60, (B, T))) * (segments > 0)
    positions = np.stack([np.arange(T) + shift for shift in (0, 1, 3)], -1) * np.ones((B, 1, 1), int)
    weight = rng.choice([0.0, 0.5, 1.0], (B, T)) * (segments > 0) * (image_row < 0)
    row = TokenInput(*map(jnp.array, (tokens, positions, segments, image_row, weight.astype(np.float32))))
    return vision if images else None, row


def loss_of(cfg: models.VLMConfig, options: tuple[str, ...] = ("image_token",)):
    """As the stages put it together: the main head, the drafts of each option with a weight of its own, and a little of
    all that blocks say; these parts are returned beside the sum."""

    def loss(params, vision, tokens):
        out = vlm.apply(cfg, params, vision, tokens)
        targets = select(tokens.tokens, tokens.segments, tokens.loss_weight, 20)
        head, aux = vlm.head(cfg, params), {"main": out.aux}

        def of_head(h_BTD, ahead):
            h_BJD, w_BJ = predictors(targets, h_BTD, tokens.segments, ahead)
            return head_loss(h_BJD, head, targets.tokens_BJ, w_BJ / w_BJ.sum(), chunk=8).total

        losses = [of_head(out.hidden, 1)]
        for option in options:
            own = dataclasses.replace(cfg, mtp=dataclasses.replace(cfg.mtp, option=option))
            drafts, aux[option] = vlm.mtp_hidden(own, params, out, tokens)
            losses += [of_head(h_BTD, ahead) for ahead, h_BTD in enumerate(drafts, start=2)]
        means = [x.mean() for path, x in jax.tree_util.tree_leaves_with_path(aux) if path[-1].key in LOSSES]
        return sum(n * x for n, x in enumerate(losses, start=1)) + 0.1 * sum(means), (losses, aux)

    # Compiled in a third of the time; nothing here is run twice.
    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})


def placed(cfg, params, sizes, rows, preset="fsdp_context_tensor"):
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    rules = rules_lib.preset(preset) if isinstance(preset, str) else preset
    shardings = rules.shardings(mesh, models.logical_axes(cfg), models.abstract_params(cfg))
    by_patch = jax.NamedSharding(mesh, rules.spec(("batch", "length"), mesh))
    where = jax.device_put(rows[0], by_patch), jax.device_put(rows[1], rules_lib.batch_sharding(mesh))
    return mesh, rules, (jax.device_put(params, shardings), *where)


@functools.cache
def alone(cfg: models.VLMConfig, *options: str):
    """(parameters, rows, what one device makes of them)."""
    params, rows = random_params(cfg), batch(cfg.vision is not None)
    return params, rows, loss_of(cfg, options)(params, *rows)


ALL = ("image_token", "embeddings", "masked")


@pytest.mark.parametrize(
    "cfg, options, sizes",
    [
        (config(depth=2), ALL, {"context": 4}),
        (config(depth=2), ALL, {"fsdp": 2, "context": 2, "tensor": 2}),
        (glm5(), ALL[:1], {"context": 4}),
    ],
    ids=["dense", "dense-fsdp-tensor", "glm5"],
)
def test_equals_one_device(cfg, options, sizes):
    params, rows, ((want, want_aux), want_grads) = alone(cfg, *options)
    mesh, rules, args = placed(cfg, params, sizes, rows)
    with rules_lib.use(mesh, rules):
        (got, got_aux), got_grads = loss_of(cfg, options)(*args)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got_aux, want_aux)
    largest = max(float(jnp.linalg.norm(g)) for g in jax.tree.leaves(want_grads))

    def close(path, a, b):
        error, norm = float(jnp.linalg.norm(a - b)), float(jnp.linalg.norm(b))
        assert error <= 1e-4 * norm + 1e-7 * largest, (jax.tree_util.keystr(path), error, norm)

    jax.tree_util.tree_map_with_path(close, got_grads, want_grads)


# --- what is communicated ---------------------------------------------------------------------------------------------


def program(fn, cfg, sizes, rows, preset="fsdp_context_tensor"):
    mesh, rules, args = placed(cfg, models.init_params(cfg, jax.random.key(0)), sizes, rows, preset)
    with rules_lib.use(mesh, rules):
        return fn.lower(*args).compile()


SPLIT_ROWS = rules_lib.Rules({"batch": mesh_lib.DATA_AXES, "length": "context"})  # and parameters whole


@pytest.mark.parametrize("option, wide", [("image_token", False), ("masked", False), ("embeddings", True)])
def test_what_the_mtp_head_makes_devices_exchange(option, wide):
    """Forward and backward of the head alone, given the backbone's results. What has the model's width passes between
    devices only where visual embeddings are fed to the head; otherwise ids, and the keys and values of its block."""
    cfg = config(option)

    def through_head(params, vision, tokens):
        hidden = rules_lib.constrain(vision.patches, "batch", "length", None)
        out = vlm.VLMOutput(hidden, hidden, 2 * hidden, None, {})
        return sum(jnp.sin(h).sum() for h in vlm.mtp_hidden(cfg, params, out, tokens)[0])

    vision, tokens = batch()
    vision = vision._replace(patches=vision.patches[..., : DECODER.width])  # stands for what the backbone returns
    step = jax.jit(jax.grad(lambda params, vision, tokens: through_head(params, vision, tokens)))
    compiled = program(step, cfg, {"context": 4}, (vision, tokens), SPLIT_ROWS)
    found = [c for c in collectives(compiled) if "f" in c.dtype]
    by_position = [c for c in found if len(c.shape) > 2]
    assert by_position, "keys and values are gathered"
    assert any(c.shape[-1] == DECODER.width for c in by_position) is wide, by_position


def test_no_device_has_a_whole_row_of_activations():
    cfg = config()
    text = program(loss_of(cfg), cfg, {"context": 4}, batch()).as_text()
    assert f"f32[{B},{T // 4},{DECODER.width}]" in text
    for width in (DECODER.width, DECODER.mlp, DECODER.heads * DECODER.head_dim, DECODER.vocab):
        assert f"f32[{B},{T},{width}]" not in text and f"f32[{B * T},{width}]" not in text, width


# --- a stage ----------------------------------------------------------------------------------------------------------

PRETRAIN = "experiments/vlm_pretrain.py:size=nano"
SMALL = ["batch=4", "data.workers=0", "model.decoder.depth=1", "model.vision.depth=1", "model.mtp.depth=2"]


def stage(name: str, *overrides: str):
    cfg = config_lib.override(config_lib.load(name), [*SMALL, *overrides])
    return main.stage_class(cfg.stage)(cfg)


def placement(stage, sizes, preset="fsdp_context"):
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    return state_lib.place(stage, optax.sgd(1e-2), mesh, rules_lib.preset(preset))


def test_a_step_of_stage_3_is_that_of_one_device():
    run = stage(PRETRAIN)
    data = run.train_data()
    rows = next(data)
    data.close()
    results = []
    for sizes, preset in (({"data": 1}, "data"), ({"fsdp": 2, "context": 4}, "fsdp_context")):
        where = placement(run, sizes, preset)
        batch = where.batch(rows)
        state = state_lib.init_state(run, optax.sgd(1e-2), where, 0)
        state, metrics = make_train_step(run, optax.sgd(1e-2), where)(state, {}, batch)
        results.append(jax.device_get((state.params, metrics)))
    assert batch["patches"].sharding.spec == jax.P("fsdp", "context")
    assert batch["patches"].addressable_shards[0].data.shape[:2] == (2, rows["patches"].shape[1] // 4)
    (one, one_metrics), (many, many_metrics) = results
    assert one_metrics.keys() == many_metrics.keys()
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), many, one)


def test_what_cannot_be_split_is_named():
    run = stage(PRETRAIN)
    with pytest.raises(UserError, match="mesh.context=4, but these rules split no rows; use rules=fsdp_context"):
        placement(run, {"context": 4}, "fsdp")
    where = placement(run, {"context": 4})
    rows = {"tokens": np.zeros((4, 110), np.int32), "frame": np.zeros((4, 128), np.int32)}
    with pytest.raises(UserError, match="rows of 110 tokens do not divide over 2 x context=4; try 112"):
        where.batch(rows)
    rows = {"tokens": np.zeros((4, 112), np.int32), "frame": np.zeros((4, 120), np.int32)}
    with pytest.raises(UserError, match="rows of 120 patches do not divide over 4 x context=4; try 128"):
        where.batch(rows)
    cfg = config_lib.load("experiments/cogvit_siglip.py:size=nano")
    siglip = main.stage_class(cfg.stage)(cfg)
    with pytest.raises(UserError, match="stage siglip has no rows to split over mesh.context=4"):
        placement(siglip, {"context": 4})
