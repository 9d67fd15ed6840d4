"""Stage 3 with images in rows of the encoder's own, over meshes, against one device with images in the rows of their
text: loss, metrics and gradients; and what crosses between devices, read from the compiled programs.

Not covered: `ragged_all_to_all` on TPUs (tests/models/test_home.py compiles it); several processes are
tests/train/test_two_hosts.py's.
"""

from __future__ import annotations

import functools
import json
import math

import jax
import numpy as np
import optax
import pytest

from glmv_jax import config as config_lib
from glmv_jax.models import vlm
from glmv_jax.parallel import context, dispatch
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import main
from glmv_jax.train import state as state_lib
from glmv_jax.train.stages.vlm import inputs
from glmv_jax.typing import TokenInput, UserError
from tests.parallel.collectives import collectives
from tests.random_params import switched_on

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
SMALL = ["batch=8", "data.workers=0", "model.decoder.depth=1", "model.vision.depth=1", "model.vision.width=64",
         "model.vision.mlp=96", "model.decoder.width=64", "model.decoder.mlp=96"]  # fmt: skip
OWN = ["data.dispatch.rows=16", "data.dispatch.patches=96"]


def stage(*overrides: str, sizes=(("data", 8),), rules: str = "data"):
    cfg = config_lib.load("experiments/vlm_pretrain.py:size=nano")
    mesh = [f"mesh.{axis}={n}" for axis, n in {"data": 1, **dict(sizes)}.items()]
    cfg = config_lib.override(cfg, [*SMALL, *mesh, f"rules={rules}", *overrides])
    return main.stage_class(cfg.stage)(cfg)


def next_batch(run):
    data = run.train_data()
    try:
        return next(data)
    finally:
        data.close()


QUICKLY = {"xla_backend_optimization_level": 0}  # compiled sooner; nothing here is run twice
WEIGHT = np.random.default_rng(0).normal(size=(8, 112, 64)).astype(np.float32)


def embedded(run):
    """(params, batch) -> (how far what enters the language model is from random numbers, its gradient)."""

    def total(params, batch):
        vision, tokens = inputs(batch, run.builder.max_patches // 4)
        tokens = TokenInput(*map(context.dealt, tokens))
        visual = vlm.encode_images(run.model, params, vision)
        x_BTD = vlm.embed(run.model, params, visual, tokens)
        return ((x_BTD - context.dealt(WEIGHT)) ** 2).mean()  # no differences of large numbers

    return jax.jit(jax.value_and_grad(total), compiler_options=QUICKLY)


def loss(run):
    return jax.jit(lambda params, batch: run.loss(params, {}, {}, batch, jax.random.key(0)), compiler_options=QUICKLY)


@functools.cache
def alone():
    """(parameters, batch, what one device makes of them) of rows that keep their images."""
    run = stage()
    params, batch = switched_on(jax.jit(run.init_params)(jax.random.key(0))), next_batch(run)
    return params, batch, jax.device_get(embedded(run)(params, batch))


def over_mesh(fn, sizes, rules):
    """(compiled program, its results, batch as it is placed) of `fn` of the stage on a mesh, images dispatched."""
    params, kept, _ = alone()
    run = stage(*OWN, sizes=tuple(sizes.items()), rules=rules)
    mesh, table = run.place()
    where = state_lib.place(run, optax.sgd(1.0), mesh, table)
    own = next_batch(run)
    np.testing.assert_array_equal(own["tokens"], kept["tokens"])
    assert (own["frame"] > 0).sum() == (kept["frame"] > 0).sum() > 0
    args = jax.device_put(params, where.state.params), where.batch(own)
    with rules_lib.use(mesh, table):
        program = fn(run).lower(*args).compile()
    return program, jax.device_get(program(*args)), args[1]


MESHES = [
    ({"data": 2, "fsdp": 4}, "fsdp"), ({"data": 2, "context": 4}, "context"), ({"data": 4, "tensor": 2}, "tensor"),
]  # fmt: skip


@pytest.mark.parametrize("sizes, rules", MESHES, ids=str)
def test_images_encoded_anywhere_give_what_enters_the_language_model_and_its_gradient(sizes, rules):
    _, _, (want, want_grads) = alone()
    program, (got, grads), batch = over_mesh(embedded, sizes, rules)
    held = {shard.device: shard.data.nbytes for shard in batch["patches"].addressable_shards}
    assert len(held) == 8 and set(held.values()) == {batch["patches"].nbytes // 8}
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads)):
        error = np.linalg.norm(g - w)
        assert error <= 1e-4 * np.linalg.norm(w), (jax.tree_util.keystr(path), error, np.linalg.norm(w))

    moved, C = collectives(program), batch["patches"].shape[-1]
    rows = lambda c: math.prod(c.shape[:-1])  # noqa: E731  of a matrix of weights at most 64
    assert not [c for c in moved if c.dtype == "u8" or (c.shape and c.shape[-1] in (C, 2 * C) and rows(c) > 64)], moved
    assert not [c for c in moved if len(c.shape) > 2 and 96 in c.shape[1:-1]], moved  # nor their features
    assert [c for c in moved if c.kind == "all-to-all" and c.shape[-1] == 64]  # visual tokens, there and back


def test_the_loss_of_the_stage_is_that_of_rows_that_keep_their_images():
    params, batch, _ = alone()
    want, (want_metrics, _) = jax.device_get(loss(stage())(params, batch))
    _, (got, (metrics, _)), _ = over_mesh(loss, {"data": 2, "fsdp": 2, "context": 2}, "fsdp_context")
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_does_not_go_with_it_is_named():
    for overrides, message in (
        (["accumulate=2"], "does not go with accumulate=2; set accumulate=1"),
        (["pipeline.ends=stages"], "does not go with pipeline.ends=stages; set pipeline.ends=rows"),
        (["data.slices=2"], "does not go with data.slices=2"),
        (["model.patches_at_once=96"], "does not go with model.patches_at_once=96; set model.patches_at_once=0"),
        (["data.dispatch.patches=40"], "an image may have 48; raise it"),
    ):
        with pytest.raises(UserError, match=message):
            stage(*OWN, *overrides)
    run = stage("data.dispatch.rows=12", "data.dispatch.patches=96")
    with pytest.raises(UserError, match="12 of a process do not divide over its 8 devices; try 16"):
        run.train_data()
    with pytest.raises(UserError, match="rows=12 does not divide over 8 devices"):
        dispatch.sharding(run.place()[0], 12)


def test_shapes_are_known_before_a_batch_and_a_resume_is_exact():
    run = stage(*OWN)
    (shapes,) = run.batch_shapes()
    data, again = run.train_data(), run.train_data()
    batch = next(data)
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }
    again.set_state(json.loads(json.dumps(data.get_state())))
    np.testing.assert_equal(next(again), next(data))
    data.close(), again.close()
    assert run.flops(batch) == run.flops(shapes) and math.isfinite(run.flops(batch))
