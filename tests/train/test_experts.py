"""A step of stage 3 with GLM-5's decoder at nano: loads counted, biases moved, auxiliary losses in the loss."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glmv_jax import config
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import main
from glmv_jax.train import state as state_lib
from glmv_jax.train.stages.vlm import inputs
from glmv_jax.train.step import make_train_step

NANO = "experiments/glm5v_pretrain.py:size=nano"
SMALL = ["batch=4", "data.workers=0", "model.decoder.depth=2", "model.vision.depth=1", "model.mtp.depth=2"]


@pytest.fixture(scope="module")
def batch():
    data = build().train_data()
    try:
        return next(data)
    finally:
        data.close()


@pytest.fixture(scope="module")
def params():
    return jax.jit(build().init_params)(jax.random.key(0))


@pytest.fixture(scope="module")
def supervised(params, batch):
    """(loss, metrics, what the blocks of the first parameters say) of the batch, both auxiliary losses counted."""
    return jax.jit(build("loss.aux.balance=0.5", "loss.aux.index_loss=2.0").supervised)(params, batch)


@pytest.fixture(scope="module")
def taught(params, batch):
    """(loss, gradients) by the factor of the indexers' loss."""

    def of(factor):
        stage = build(f"loss.aux.index_loss={factor}")
        return jax.jit(jax.value_and_grad(lambda p, batch: stage.supervised(p, batch)[0]))(params, batch)

    return {factor: of(factor) for factor in (0.0, 1.0)}


@pytest.fixture(scope="module")
def alone(batch):
    """A step of one device; its rate is nothing to biases."""
    return step(build(), batch, rate=1.0)


def build(*overrides: str):
    cfg = config.override(config.load(NANO), [*SMALL, *overrides])
    return main.stage_class(cfg.stage)(cfg)


def step(stage, batch, sizes=None, rules="data", rate=1e-3):
    """(parameters before and after a step of plain gradient descent, its extra state, its metrics)."""
    sizes = sizes or {"data": 1}
    mesh, optimizer = mesh_lib.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]), optax.sgd(rate)
    placement = state_lib.place(stage, optimizer, mesh, rules_lib.preset(rules))
    state = state_lib.init_state(stage, optimizer, placement, 0)
    before = jax.device_get(state.params)
    state, metrics = make_train_step(stage, optimizer, placement)(state, {}, placement.batch(batch))
    return before, jax.device_get(state.params), jax.device_get(state.extra), jax.device_get(metrics)


@pytest.mark.parametrize("pieces", [1, 2])
def test_biases_follow_the_loads_of_the_whole_batch(pieces, batch, supervised, alone):
    """The head's loads are those of both depths; each valid token chooses `chosen` experts a layer."""
    stage = build(f"accumulate={pieces}")
    before, after, extra, metrics = step(stage, batch) if pieces > 1 else alone
    _, tokens = inputs(batch)
    valid = int((np.asarray(tokens.segments) > 0).sum())
    c, rate = stage.model.decoder, stage.cfg.experts.bias_rate
    loads = {path: np.asarray(x) for path, x in supervised[2].items() if path.endswith("/load")}
    assert set(loads) == {"decoder/blocks1/layer0/load", "mtp/block/layer0/load"}
    assert loads["decoder/blocks1/layer0/load"].sum() == valid * c.chosen
    assert loads["mtp/block/layer0/load"].sum() == 2 * valid * c.chosen
    for path, load in loads.items():
        *folders, _ = path.split("/")
        old, new = before, after
        for name in (*folders, "moe", "router_bias"):
            old, new = old[name], new[name]
        mean = load.mean(-1, keepdims=True)
        np.testing.assert_allclose(new - old, rate * np.sign(mean - load), atol=1e-7)
    assert not any(np.any(x) for x in jax.tree.leaves(extra))
    assert metrics["expert_imbalance"] > 0 and metrics["skipped"] == 0


def test_auxiliary_losses_are_in_the_loss(supervised, taught):
    (loss, metrics, _), (without, _) = supervised, taught[0.0]
    assert metrics["aux/balance"] >= 0.9 and metrics["aux/index_loss"] > 0
    balance = 0.5 - build().cfg.loss.aux.balance
    want = balance * metrics["aux/balance"] + 2 * metrics["aux/index_loss"]
    np.testing.assert_allclose(loss - without, want, rtol=1e-4)


def test_only_its_own_loss_teaches_an_indexer(taught):
    grads = {factor: grads for factor, (_, grads) in taught.items()}
    of = lambda factor: grads[factor]["decoder"]["blocks1"]["layer0"]["attention"]["indexer"]  # noqa: E731
    assert not any(np.any(g) for g in jax.tree.leaves(of(0.0)))
    assert all(np.any(g) for g in jax.tree.leaves(of(1.0)))
    rest = lambda tree: [x for p, x in jax.tree_util.tree_leaves_with_path(tree) if "indexer" not in str(p)]  # noqa: E731
    for a, b in zip(rest(grads[0.0]), rest(grads[1.0])):
        np.testing.assert_array_equal(jnp.asarray(a), jnp.asarray(b))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
def test_a_step_over_a_mesh_is_that_of_one_device(batch, alone):
    """The whole of stage 3: loss, gradients, loads and where the biases move."""
    _, want, _, alone = alone
    sizes = {"fsdp": 2, "expert": 2, "tensor": 2}
    before, after, extra, metrics = step(build(), batch, sizes, "fsdp_expert_tensor", rate=1.0)
    np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["expert_imbalance"], alone["expert_imbalance"], rtol=1e-6)
    assert not any(np.any(x) for x in jax.tree.leaves(extra))
    for (path, old), got, other in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), jax.tree.leaves(want)
    ):
        if "router_bias" in str(path):
            np.testing.assert_array_equal(got, other)
        moved, expected = got - old, other - old  # the gradient, at a rate of 1
        assert np.abs(moved - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-7, path
