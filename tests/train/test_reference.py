"""Policies that wait in the host's memory, and what stage 5 makes of what they say.

Not covered: whether a copy to a device takes less time than the rewards it is hidden behind; a CPU has one memory.
"""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from glmv_jax import config
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.rl import Grade
from glmv_jax.train import checkpoint, main, reference
from glmv_jax.train import state as state_lib
from glmv_jax.train.reference import Parked
from glmv_jax.typing import UserError
from tests.random_params import switched_on
from tests.train.test_rl_integrity import build

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")


def numbers(seed):
    rng = np.random.default_rng(seed)
    return {"a": {"w": rng.normal(size=(64, 256)).astype(np.float32)}, "b": rng.normal(size=256).astype(np.float32)}


def saved(folder, params):
    folder.mkdir()
    (folder / "results.json").write_text("{}")
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    checkpoints.save(1, checkpoint.TrainState(np.int32(1), jax.tree.map(jnp.asarray, params), {}, {}), {})
    checkpoints.wait()
    checkpoints.close()
    return str(folder)


def device_bytes():
    return sum(x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind == "device")


def kinds(params):
    return {x.sharding.memory_kind for x in jax.tree.leaves(params)}


@needs_8
def test_weights_are_on_the_devices_for_their_turn_alone(tmp_path):
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 4}, jax.devices()[:8])
    where = {"a": {"w": NamedSharding(mesh, PartitionSpec("fsdp"))}, "b": NamedSharding(mesh, PartitionSpec())}
    want = numbers(0)
    run = saved(tmp_path / "run", want)
    x_BI = jnp.asarray(np.random.default_rng(1).normal(size=(8, 64)), jnp.float32)
    forward = jax.jit(lambda p, x_BI: jax.nn.log_softmax(x_BI @ p["a"]["w"] + p["b"]))
    resident = np.asarray(forward(jax.device_put(want, where), x_BI))

    parked = Parked.of_run(run, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, want)), where)
    before = device_bytes()
    assert kinds(parked._parked) == {"pinned_host"} and not parked.is_here
    for _ in range(2):  # it can be asked again
        parked.prefetch()
        copies = parked._here
        parked.prefetch()
        assert parked.is_here and parked._here is copies and kinds(copies) == {"device"}
        assert device_bytes() > before
        with parked.here() as params:
            assert params is copies and jax.tree.map(lambda x: x.sharding, params) == where
            got = np.asarray(forward(params, x_BI))
        np.testing.assert_array_equal(got, resident)
        assert not parked.is_here and all(x.is_deleted() for x in jax.tree.leaves(copies))
        del params, copies
        assert device_bytes() == before and kinds(parked._parked) == {"pinned_host"}
    with pytest.raises(RuntimeError, match="boom"), parked.here():
        raise RuntimeError("boom")
    assert not parked.is_here and device_bytes() == before


def test_weights_of_another_model_are_refused(tmp_path):
    run = saved(tmp_path / "run", numbers(0))
    wide = {"a": {"w": jax.ShapeDtypeStruct((64, 512), np.float32)}, "b": jax.ShapeDtypeStruct((256,), np.float32)}
    here = NamedSharding(mesh_lib.make_mesh({"data": 1}, jax.devices()[:1]), PartitionSpec())
    where = jax.tree.map(lambda _: here, wide)
    with pytest.raises(UserError, match=r"a/w is \(64, 256\) there and \(64, 512\) here"):
        Parked.of_run(run, wide, where)


def test_who_is_asked_for_what():
    def roles(**group):
        return reference.roles(ConfigDict({"init_from": "start", "reference": group}), ["count", "read", "chart"])

    assert roles() == {} and reference.roles(ConfigDict(), ["count"]) == {}
    assert roles(policy="init_from") == {"start": reference.Role(True, ())}
    found = roles(policy="a", teachers=(("read", "b"), ("*", "a")))
    assert found == {"a": reference.Role(True, (0, 2)), "b": reference.Role(False, (1,))}
    with pytest.raises(UserError, match="no source 'reed' is trained on; nearest: read"):
        roles(teachers=(("reed", "b"),))
    with pytest.raises(UserError, match="count has no teacher; name one, or one for '\\*'"):
        roles(teachers=(("read", "b"),))
    with pytest.raises(UserError, match="init_from is not set"):
        reference.roles(ConfigDict({"init_from": "", "reference": {"policy": "init_from"}}), [])


# --- stage 5 ----------------------------------------------------------------------------------------------------------

SMALL = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.prompts=4", "rollout.group=2",
         "rollout.max_new_tokens=3", "rollout.rows=(8,)", "rollout.proximal=True", "loss.distil.kind=top_k",
         "loss.distil.top_k=4", "loss.kl.factor=0.1"]  # fmt: skip


def stage(*more):
    made = main.stage_class("rl")(config.override(config.load("experiments/rl_grpo.py:size=nano"), [*SMALL, *more]))
    fresh = made.init_params
    made.init_params = lambda key: switched_on(fresh(key))
    return made


@pytest.fixture(scope="module")
def asked():
    """(stage, batch, trained parameters, weights of two teachers, what the graders saw): one step's batch.

    The first teacher is the reference too. Tasks other than the first two are the second teacher's.
    """
    made = stage()
    rest = tuple(range(2, len(made.names)))
    made.others.roles = {"a": reference.Role(True, (0, 1)), "b": reference.Role(False, rest)}
    mesh = mesh_lib.make_mesh({"data": 1}, jax.devices()[:1])
    placement = state_lib.place(made, optax.sgd(1.0), mesh, rules_lib.preset("data"))
    given = [jax.jit(made.init_params, out_shardings=placement.state.params)(jax.random.key(n)) for n in range(3)]
    made.others._placement = placement
    host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), placement.state.params)
    made.others.parked = {name: Parked(jax.device_put(p, host)) for name, p in zip("ab", given[1:])}
    seen = []

    def grade(text, sample):
        seen.append([parked.is_here for parked in made.others.parked.values()])
        return Grade(0.0, False, {})

    made.verifiers = dict.fromkeys(made.names, grade)
    before = device_bytes()
    batch, _ = made.next_batch(made.train_data(), types.SimpleNamespace(params=given[0], step=0))
    held = sum(x.nbytes for x in batch.values() if isinstance(x, jax.Array))
    return made, batch, given, seen, device_bytes() - before - held


def test_the_first_policy_is_on_its_way_while_rewards_are_computed(asked):
    made, _, _, seen, left = asked
    assert seen and all(row == [True, False] for row in seen)
    assert not any(parked.is_here for parked in made.others.parked.values())
    assert left < 100_000, "bytes of another policy are left on the device"
    spans = {(span.stage, span.name): span for span in made.samples.trace.spans}
    first, second, reward = (spans[x] for x in (("reference", "a"), ("reference", "b"), ("reward", "step 0")))
    assert first.begin < reward.end < first.end and second.begin < first.end < second.end


def test_beside_the_training_it_is_on_its_way_before_its_batch_is_there(tmp_path):
    """As the trace tells it, which Perfetto shows: started before the batch was made, gone before the next update."""
    made = build(tmp_path, "async")
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    made.others.roles = {"a": reference.Role(True, ())}
    made.others.parked = {"a": Parked(jax.device_put(numbers(0), host))}
    seen = {"grader": [], "forward": []}
    graders = dict(made.verifiers)

    def grade(text, sample):
        seen["grader"].append(made.others.parked["a"].is_here)
        return graders[sample.source](text, sample)

    def logprobs(params, rows):
        seen["forward"].append(kinds(params))
        return jnp.zeros(rows["tokens"].shape)

    made.verifiers, made.others.logprobs = dict.fromkeys(made.names, grade), logprobs
    data = made.train_data()
    try:
        for step in range(3):
            made.next_batch(data, types.SimpleNamespace(params={}, step=step))
            assert not made.others.parked["a"].is_here and kinds(made.others.parked["a"]._parked) == {"pinned_host"}
    finally:
        data.close()
    assert seen["forward"] == [{"device"}] * 3 and len(seen["grader"]) == 24 and all(seen["grader"])
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = {name: sorted((e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e.get("cat") == name)
             for name in ("reference", "batch", "train")}  # fmt: skip
    assert len(spans["reference"]) == len(spans["batch"]) == 3
    for held, batch in zip(spans["reference"], spans["batch"]):
        assert held[0] < batch[0] < batch[1] < held[1], "under way while answers were drawn, graded and packed"
    assert trace["otherData"]["reference_seconds"] > 0


def test_log_probabilities_are_those_of_resident_weights(asked):
    made, batch, (own, a, b), _, _ = asked
    on = batch["loss_weight"] > 0
    logprobs = lambda params: np.asarray(made.others.logprobs(params, made.others._placement.batch(rows)))  # noqa: E731
    rows = {name: x for name, x in batch.items() if name not in made.others.shapes(1, 1)}
    np.testing.assert_array_equal(batch["reference"], logprobs(a))
    np.testing.assert_array_equal(batch["proximal"], logprobs(own))
    np.testing.assert_allclose(np.asarray(batch["proximal"])[on], batch["old_logprob"][on], atol=1e-4)
    assert not np.asarray(batch["reference"])[~on].any()
    assert np.abs(np.asarray(batch["reference"]) - batch["old_logprob"])[on].max() > 0.1
    for sources, params in ((0, 1), a), (range(2, len(made.names)), b):
        words = made.others.likeliest(params, made.others._placement.batch(rows))
        here = on & np.isin(batch["source"], list(sources))
        assert here.any()
        for name, x in words.items():
            np.testing.assert_array_equal(np.asarray(batch[name])[here], np.asarray(x)[here])


def test_what_they_say_is_in_the_loss(asked):
    """One's own word has no distance; the batch has the shapes that its step was compiled for."""
    made, batch, (own, a, _), _, _ = asked
    (shapes,) = made.batch_shapes()
    assert {n: (x.shape, x.dtype) for n, x in shapes.items()} == {n: (x.shape, x.dtype) for n, x in batch.items()}
    loss = jax.jit(lambda p, batch: made.loss(p, {}, {}, batch, None)[1][0])
    found = loss(own, batch)
    assert found["reference_kl"] > 0.01 and found["distil"] > 0.01 and found["mismatch_kl"] < 1e-6
    at_home = loss(a, batch)
    assert abs(at_home["reference_kl"]) < 1e-6 and 0 < at_home["distil"] < found["distil"]
    own_word = made.others.likeliest(own, made.others._placement.batch(batch))
    assert abs(loss(own, batch | own_word)["distil"]) < 1e-6


def test_a_run_reads_its_reference_when_it_asks_for_data(tmp_path):
    """And an evaluation, which asks for none, needs no such folder."""
    shapes = jax.eval_shape(stage().init_params, jax.random.key(0))
    run = saved(tmp_path / "run", jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))
    made = stage(f"reference.policy={run}")
    mesh = mesh_lib.make_mesh({"data": 1}, jax.devices()[:1])
    made.begin(state_lib.place(made, optax.sgd(1.0), mesh, rules_lib.preset("data")), {}, {}, fresh=True)
    assert not made.others.parked
    made.train_data().close()
    (parked,) = made.others.parked.values()
    assert kinds(parked._parked) == {"pinned_host"} and not parked.is_here
    with parked.here() as params:
        assert all(np.all(x == 1) for x in jax.tree.leaves(params))
        assert jax.tree.structure(params) == jax.tree.structure(shapes)


def test_settings_of_the_stage_that_are_wrong():
    with pytest.raises(UserError, match="set rollout.components"):
        stage("rollout.advantage=gdpo")
    with pytest.raises(UserError, match="loss.surrogate='gsp' is not known; nearest: gspo"):
        stage("loss.surrogate=gsp")
