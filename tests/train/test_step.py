"""The jitted step and where its state lives. Not covered: more than one process."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glmv_jax import optim
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import state as state_lib
from glmv_jax.train import step as step_lib
from glmv_jax.train.step import RecompileError, make_train_step
from glmv_jax.trees import flatten
from glmv_jax.typing import UserError
from tests.train.toy import Data, Toy, config


def make(cfg, devices=None, sizes=None, preset="data", stage=None):
    stage = stage or Toy(cfg)
    shapes = jax.eval_shape(stage.init_params, jax.random.key(0))
    optimizer = optim.build(cfg.optim, shapes, cfg.steps)
    mesh = mesh_lib.make_mesh(sizes or {"data": -1}, devices)
    placement = state_lib.place(stage, optimizer, mesh, rules_lib.preset(preset))
    step = make_train_step(
        stage, optimizer, placement, trainable=optim.trainable(cfg.optim, shapes), seed=cfg.seed
    )
    state = state_lib.init_state(stage, optimizer, placement, cfg.seed)
    return stage, optimizer, placement, step, state


def constants(stage, placement):
    return jax.device_put(stage.constants(), placement.replicated)


def run(cfg, steps=4, **kwargs):
    stage, _, placement, step, state = make(cfg, **kwargs)
    data, rows = Data(cfg), []
    for _ in range(steps):
        state, metrics = step(state, constants(stage, placement), placement.batch(next(data)))
        rows.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), rows


def test_one_step_equals_the_update_written_out():
    cfg = config()
    stage, optimizer, placement, step, state = make(cfg)
    batch, key = next(Data(cfg)), jax.random.fold_in(jax.random.key(0), 0)
    before = jax.device_get(make(cfg)[4])  # of another one: reading this state would keep its memory from being taken
    loss, grads = jax.value_and_grad(
        lambda p: stage.loss(p, stage.constants(), stage.init_extra(), batch, key)[0]
    )(before.params)
    updates, _ = optimizer.update(grads, optimizer.init(before.params), before.params)
    want = optax.apply_updates(before.params, updates)

    after, metrics = step(state, constants(stage, placement), placement.batch(batch))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.params, want)
    assert int(after.step) == 1 and float(after.extra["seen"]) == 16
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    square = lambda tree: float(sum(np.square(x).sum() for x in jax.tree.leaves(tree)) ** 0.5)  # noqa: E731
    assert float(metrics["grad_norm"]) == pytest.approx(square(grads), rel=1e-4)
    assert float(metrics["param_norm"]) == pytest.approx(square(want), rel=1e-4)
    assert jax.tree.leaves(state.params)[0].is_deleted()  # the step took its memory


@pytest.mark.parametrize(
    "sizes, preset", [({"data": -1}, "data"), ({"fsdp": -1}, "fsdp"), ({"data": 2, "tensor": 4}, "fsdp_tensor")]
)
def test_eight_devices_compute_what_one_does(sizes, preset):
    cfg = config(width=16)
    stage = WideToy(cfg)
    one, rows_one = run(cfg, devices=jax.devices()[:1], stage=stage)
    many, rows_many = run(cfg, sizes=sizes, preset=preset, stage=stage)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one, many)
    for a, b in zip(rows_one, rows_many, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


class WideToy(Toy):
    """The toy with an input width that divides over eight devices."""

    def init_params(self, key):
        params = super().init_params(key)
        params["body"]["kernel"] = jnp.pad(params["body"]["kernel"], ((0, 2), (0, 0)), constant_values=0.1)
        return params

    def predict(self, params, x):
        return super().predict(params, jnp.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=0.5))


def test_moments_live_where_their_parameters_do():
    cfg = config(width=16)
    _, _, _, _, state = make(cfg, sizes={"fsdp": -1}, preset="fsdp", stage=WideToy(cfg))
    kernel = state.params["body"]["kernel"].sharding
    assert kernel.spec == jax.sharding.PartitionSpec("fsdp", None)
    moments = [
        leaf.sharding for path, leaf in flatten(state.opt_state).items() if path.endswith("body/kernel")
    ]
    assert len(moments) == 2 and all(sharding == kernel for sharding in moments)


def test_the_step_is_traced_once_a_shape():
    cfg = config()
    stage, _, placement, step, state = make(cfg)
    data = Data(cfg)
    for _ in range(3):
        state, _ = step(state, constants(stage, placement), placement.batch(next(data)))
    assert step.traces == 1
    batch = next(data)
    with pytest.raises(RecompileError, match=r"y was float32 \(16, 4, 1\), is int32 \(16, 4, 1\); pad the batches"):
        step(state, constants(stage, placement), placement.batch(dict(batch, y=batch["y"].astype(np.int32))))
    with pytest.raises(RecompileError, match=r"z was absent, is float32 \(16,\)"):
        step(state, constants(stage, placement), placement.batch(dict(batch, z=np.zeros(16, np.float32))))
    assert step.traces == 1


def test_a_state_that_drifts_raises_and_does_not_compile_again():
    cfg = config()
    stage, _, placement, step, state = make(cfg)
    batch = placement.batch(next(Data(cfg)))
    state, _ = step(state, constants(stage, placement), batch)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    with pytest.raises(TypeError):
        step(state._replace(params=half), constants(stage, placement), batch)
    assert step.traces == 1


def test_a_step_that_is_not_finite_changes_nothing_but_the_step():
    cfg = config(poison=(1,))
    before, rows = run(cfg, 1)
    after, rows = run(cfg, 2)
    assert [row["skipped"] for row in rows] == [0.0, 1.0] and np.isnan(rows[1]["loss"])
    jax.tree.map(np.testing.assert_array_equal, before._replace(step=0), after._replace(step=0))
    assert (int(before.step), int(after.step)) == (1, 2)
    assert np.isfinite(run(cfg, 3)[1][2]["loss"])


def test_what_is_not_finite_first_is_named():
    cfg = config(poison=(0,))
    stage, _, placement, step, state = make(cfg)
    poisoned, sound = (placement.batch(next(data)) for data in [Data(cfg)] for _ in range(2))
    state = state._replace(step=state.step + 1)
    names = step.nonfinite(state, constants(stage, placement), poisoned)
    assert names[:3] == ["batch/x", "batch/y", "loss"] and {"gradient/body/kernel", "gradient/head/bias"} < set(names)
    assert step.nonfinite(state, constants(stage, placement), sound) == []
    state.params["head"]["bias"] = jnp.full_like(state.params["head"]["bias"], jnp.inf)
    names = step.nonfinite(state, constants(stage, placement), sound)
    assert names[:2] == ["params/head/bias", "loss"] and "batch/x" not in names


def test_frozen_parameters_are_not_differentiated():
    frozen = dict(optim=dict(groups=(("body/.*", dict(kind="frozen")), (".*", dict(kind="adamw")))))
    cfg = config(**frozen)
    start = jax.device_get(make(cfg)[4])
    after, rows = run(cfg, 1)
    jax.tree.map(np.testing.assert_array_equal, start.params["body"], after.params["body"])
    assert not np.array_equal(start.params["head"]["kernel"], after.params["head"]["kernel"])
    assert 0 < rows[0]["grad_norm"] < run(config(), 1)[1][0]["grad_norm"]  # the norm is that of the trained ones


def test_the_key_differs_by_step_and_by_seed():
    noise = [row["noise"] for row in run(config(), 3)[1]]
    assert len(set(noise)) == 3
    assert run(config(seed=1), 1)[1][0]["noise"] != noise[0]


@pytest.mark.parametrize(("limit", "waits"), [(0, True), (1 << 60, False)])
def test_a_step_that_needs_much_memory_waits_on_a_cpu_for_the_one_before(monkeypatch, limit, waits):
    """Else both would hold theirs. A small one does not wait: its batch comes while the one before is computed."""

    class Slow(Toy):
        def loss(self, params, constants, extra, batch, key):
            loss, rest = super().loss(params, constants, extra, batch, key)
            x = jnp.broadcast_to(jax.lax.stop_gradient(loss), (900, 900))
            for _ in range(20):
                x = jnp.tanh(x @ x)
            return loss + 0.0 * x[0, 0], rest

    monkeypatch.setattr(step_lib, "ALONE", limit)
    stage, _, placement, step, state = make(config(), devices=jax.devices()[:1], stage=Slow(config()))
    kept, batch = constants(stage, placement), placement.batch(next(Data(config())))
    state, first = step(state, kept, batch)
    state, _ = step(state, kept, batch)
    assert first["loss"].is_ready() == waits


def test_a_reserved_metric_is_refused():
    class Clash(Toy):
        def loss(self, *args):
            loss, (metrics, extra) = super().loss(*args)
            return loss, (metrics | {"grad_norm": loss}, extra)

    stage, _, placement, step, state = make(config(), stage=Clash(config()))
    with pytest.raises(ValueError, match="returns the metric grad_norm"):
        step(state, constants(stage, placement), placement.batch(next(Data(config()))))


def test_batches_are_split_by_rows_and_must_divide():
    _, _, placement, _, _ = make(config())
    batch = placement.batch({"x": np.ones((16, 3)), "n": np.float32(2), "on_device": jnp.ones((8, 2))})
    assert batch["x"].sharding.shard_shape((16, 3)) == (2, 3) and batch["n"].sharding.is_fully_replicated
    assert batch["on_device"].sharding.shard_shape((8, 2)) == (1, 2)
    with pytest.raises(UserError, match="batch=60 does not divide over 8 data shards; try 64"):
        placement.batch({"x": np.ones((60, 3))})
