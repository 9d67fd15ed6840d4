"""Averages, freezing and adapters in whole runs of the toy stage, and adapters of a small vision-language model.

Not covered: adapters of experts in a model (tests/optim/test_lora.py has their arithmetic), several processes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from glmv_jax.config import presets
from glmv_jax.optim.lora import apply_adapters
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import checkpoint, loop, lora, main, weights
from glmv_jax.train import state as state_lib
from glmv_jax.train.checkpoint import Checkpoints
from glmv_jax.train.metrics import read_jsonl
from glmv_jax.train.step import make_train_step
from glmv_jax.trees import flatten
from glmv_jax.typing import UserError
from tests.train.test_stages import build, one_batch
from tests.train.toy import Toy, config

# The same at every length of run, so that a run in two parts is a run in one.
OPTIM = dict(
    lr=0.05, schedule=dict(warmup=0, decay="constant", final=1.0), groups=((".*", dict(kind="adamw")),)
)  # fmt: skip
ADAPTERS = presets.LORA | dict(rank=2, alpha=4.0, targets=(".*/kernel",))


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def files(folder):
    """Names of all that a checkpoint's training state holds."""
    return set(checkpoint._table(checkpoint._metadata(folder)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base")
    return workdir, main.run(config(optim=OPTIM), workdir)


def test_an_average_is_evaluated_handed_on_and_resumed_bitwise(tmp_path):
    settings = dict(optim=OPTIM, ema=0.8, evaluate="ema", save_every=1, keep=20)
    results = main.run(config(**settings), tmp_path / "whole")
    run = tmp_path / "whole"
    want = Toy(config()).init_params(jax.random.key(0))
    for step in range(1, 13):
        params = checkpoint.load_item(run / "checkpoints" / str(step) / "params")
        want = jax.tree.map(lambda a, p: 0.8 * np.asarray(a, np.float64) + 0.2 * p, want, params)
    got = weights.load(run)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)
    assert not same(got, checkpoint.load_params(run))
    error = Toy(config()).evaluate(got, {"seen": np.float32(0)}, full=True)["error"]
    assert results["metrics"]["error"]["trained"] == pytest.approx(error, rel=1e-5)
    assert main.evaluate(run)["error"] == pytest.approx(error, rel=1e-5)

    main.run(config(**settings, steps=7), tmp_path / "parts")
    main.run(config(**settings), tmp_path / "parts")
    assert same(got, weights.load(tmp_path / "parts"))

    head = weights.load(run, ["head"])
    assert same(head, {"head": got["head"]})
    like = {"head": jax.tree.map(jnp.zeros_like, got["head"]), "other": jnp.ones(2)}
    placed = weights.load(run, ["head"], like=like)
    assert same(placed, {"head": got["head"], "other": np.ones(2)})
    with pytest.raises(UserError, match="has no subtree 'hed'"):
        weights.load(run, ["hed"])
    with pytest.raises(UserError, match="does not fit this model: body/bias is only there"):
        weights.load(run, like={"head": got["head"]})


def test_without_an_average_there_is_none_to_evaluate(tmp_path):
    with pytest.raises(UserError, match="keeps no average of its parameters; set ema"):
        main.run(config(optim=OPTIM, evaluate="ema"), tmp_path)
    with pytest.raises(UserError, match="evaluate='mean' is not known; choose params or ema"):
        main.run(config(optim=OPTIM, evaluate="mean"), tmp_path / "other")


def test_what_a_run_freezes_stays_and_keeps_no_state(tmp_path):
    main.run(config(optim=OPTIM, freeze=("body/.*",), ema=0.9), tmp_path)
    start = Toy(config()).init_params(jax.random.key(0))
    middle, end = (checkpoint.load_item(tmp_path / "checkpoints" / step / "params") for step in ("8", "12"))
    assert same(middle["body"], end["body"]) and not np.array_equal(middle["head"]["kernel"], end["head"]["kernel"])
    np.testing.assert_allclose(end["body"]["kernel"], start["body"]["kernel"], rtol=1e-6)
    saved = files(tmp_path / "checkpoints" / "12" / "training")
    assert any("head/kernel" in name for name in saved) and not any("body" in name for name in saved)


def test_adapters_are_trained_saved_resumed_merged_and_handed_on(base, tmp_path):
    folder, trained = base
    settings = dict(optim=OPTIM, lora=ADAPTERS | dict(base=str(folder)), seed=3)
    results = main.run(config(**settings), tmp_path / "whole")
    assert results["metrics"]["error"]["untrained"] == pytest.approx(trained["metrics"]["error"]["trained"], rel=1e-5)
    assert results["metrics"]["error"]["trained"] != results["metrics"]["error"]["untrained"]

    run = tmp_path / "whole"
    adapters, before = checkpoint.load_params(run), checkpoint.load_params(folder)
    assert set(adapters) == {"lora"} and adapters["lora"]["body"]["kernel"]["a"].shape == (6, 2)
    named = files(run / "checkpoints" / "12" / "training")
    assert not any("kernel" in name and not name.endswith(("/a", "/b")) for name in named)
    assert checkpoint.load_config(run).lora.base == str(folder)

    merged = weights.load(run)
    want = jax.tree.map(lambda x: np.asarray(x, np.float64), before)
    for part in ("body", "head"):
        ab = adapters["lora"][part]["kernel"]
        want[part]["kernel"] += 2.0 * ab["a"].astype(np.float64) @ ab["b"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, want)
    error = Toy(config()).evaluate(merged, {"seen": np.float32(0)}, full=True)["error"]
    assert results["metrics"]["error"]["trained"] == pytest.approx(error, rel=1e-5)  # merged = applied

    main.run(config(**settings, steps=7), tmp_path / "parts")
    main.run(config(**settings), tmp_path / "parts")
    assert same(adapters, checkpoint.load_params(tmp_path / "parts"))

    # A next run starts from the merged weights, one with adapters of the same base from the adapters.
    after = main.run(config(optim=OPTIM, init_from=str(run), steps=1), tmp_path / "next")
    assert after["metrics"]["error"]["untrained"] == pytest.approx(error, rel=1e-5)
    averaged = dict(init_from=str(run), steps=3, ema=0.5, evaluate="ema")
    more = main.run(config(**settings, **averaged), tmp_path / "more")["metrics"]["error"]
    assert more["untrained"] == pytest.approx(error, rel=1e-5)
    average = weights.load(tmp_path / "more")  # of the adapters, then merged
    error = Toy(config()).evaluate(average, {"seen": np.float32(0)}, full=True)["error"]
    assert more["trained"] == pytest.approx(error, rel=1e-5)
    # A base in bfloat16: merged in that dtype, as it was applied.
    half = settings["lora"] | dict(dtype="bfloat16")
    third = main.run(config(**settings | dict(lora=half, steps=3)), tmp_path / "half")["metrics"]["error"]["trained"]
    error = Toy(config()).evaluate(weights.load(tmp_path / "half"), {"seen": np.float32(0)}, full=True)["error"]
    assert third == pytest.approx(error, rel=1e-5)


class OnPolicy(Toy):
    """Says what it is given to make batches with."""

    on_policy = True

    def next_batch(self, data, state):
        batch, more = super().next_batch(data, state)
        return batch, more | {"body": float(jnp.abs(state.params["body"]["kernel"]).sum())}


def test_batches_are_made_with_the_adapted_model(base, tmp_path, monkeypatch):
    monkeypatch.setitem(main.STAGES, "policy", "tests.train.test_tuning:OnPolicy")
    settings = dict(stage="policy", optim=OPTIM, lora=ADAPTERS | dict(base=str(base[0])), keep=20, save_every=1)
    main.run(config(**settings, steps=3), tmp_path)
    seen = [row["body"] for row in read_jsonl(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    start = checkpoint.load_params(base[0])["body"]["kernel"]
    after = [checkpoint.load_item(tmp_path / "checkpoints" / step / "params") for step in ("1", "2")]
    ab = [adapters["lora"]["body"]["kernel"] for adapters in after]
    want = [np.abs(w).sum() for w in (start, *(start + 2.0 * x["a"] @ x["b"] for x in ab))]
    np.testing.assert_allclose(seen, want, rtol=1e-5)
    assert len(set(seen)) == 3


def test_another_base_or_none_is_refused(base, tmp_path):
    settings = dict(optim=OPTIM, lora=ADAPTERS | dict(base=str(base[0])))
    main.run(config(**settings, steps=3), tmp_path / "run")
    main.run(config(optim=OPTIM, seed=5), tmp_path / "other")
    settings["lora"] = settings["lora"] | dict(base=str(tmp_path / "other"))
    with pytest.raises(UserError, match="has other parameters than when this run began"):
        main.run(config(**settings), tmp_path / "run")
    with pytest.raises(UserError, match="lora.base is not; give the run whose parameters are adapted"):
        main.run(config(optim=OPTIM, lora=ADAPTERS), tmp_path / "none")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
def test_adapters_of_a_vision_language_model(tmp_path):
    """They start as the base, a step moves only them, and eight devices with a split base in bfloat16 agree."""
    plain = build("sft", "model.vision.depth=1", "model.decoder.depth=2")
    params = plain.init_params(jax.random.key(7))
    saver = Checkpoints(tmp_path / "checkpoints")
    saver.save(1, state_lib.TrainState(jnp.int32(1), params, {}, {}), {})
    saver.close()
    (tmp_path / "results.json").write_text("{}")
    batch = one_batch(plain)

    def stepped(sizes, rules, dtype):
        stage = build("sft", "model.vision.depth=1", "model.decoder.depth=2", "lora.rank=4", f"lora.dtype={dtype}",
                      f"lora.base={tmp_path}", "optim.lr=0.01")  # fmt: skip
        stage = lora.adapted(stage)
        assert isinstance(stage, lora.Adapted)
        mesh = mesh_lib.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        stage.place = lambda _: (mesh, rules_lib.preset(rules))
        placement, optimizer, trainable = loop.prepare(stage)
        state = state_lib.init_state(stage, optimizer, placement, 0)
        constants = jax.device_put(stage.constants(), placement.constants)
        state = state._replace(extra=stage.begin(placement, constants, state.extra, fresh=True))
        start = jax.device_get(state.params)
        step = make_train_step(stage, optimizer, placement, trainable=trainable)
        state, metrics = step(state, constants, placement.batch(batch))
        return start, jax.device_get(state), jax.device_get(metrics), constants

    start, state, metrics, constants = stepped({"data": 1}, "data", "float32")
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: plain.supervised(p, batch)[0]))(params)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert same(jax.device_get(constants["base"]), params)
    begun, done = flatten(start), flatten(state.params)
    named = {name: (begun[name], done[name]) for name in begun}
    assert len(named) == 2 * 7 and named["lora/decoder/blocks/mlp/up/kernel/a"][0].shape == (2, 128, 4)
    # While B is zero, A has no gradient and B has.
    assert all(np.array_equal(*pair) == name.endswith("/a") for name, pair in named.items())

    # Its gradient, from that of the whole model: dB = alpha / rank * A^T dW.
    cfg = build("sft", "lora.rank=4").cfg.lora

    def adapted_loss(adapters):
        return plain.supervised(apply_adapters(cfg, params, adapters), batch)[0]

    got = jax.jit(jax.grad(adapted_loss))(start)["lora"]["decoder"]["blocks"]["attention"]["q"]["kernel"]["b"]
    a = start["lora"]["decoder"]["blocks"]["attention"]["q"]["kernel"]["a"]
    dw = np.asarray(gradient["decoder"]["blocks"]["attention"]["q"]["kernel"], np.float64)
    np.testing.assert_allclose(got, 4.0 * np.swapaxes(a, 1, 2) @ dw, rtol=1e-3, atol=1e-6)

    half = stepped({"data": 1}, "data", "bfloat16")
    many = stepped({"data": 2, "fsdp": 4}, "fsdp", "bfloat16")
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(many[3]["base"]))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(many[3]["base"]))
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(many[2][key], half[2][key], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["stored", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_parts_of_merged_matrices_are_those_of_the_whole(stored, dtype):
    """An export reads a layer at a time what the run computed with as a whole."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    base, a, b = draw(3, 6, 8).astype(stored), draw(3, 6, 2), draw(3, 2, 8)
    settings = ConfigDict(dict(rank=2, alpha=6.0, dtype=dtype))
    array, plain = weights.Merged(settings, base, (a, b)), weights.Merged(settings, base, None)
    kept = stored if dtype == "stored" else dtype
    want = (base.astype(kept).astype(np.float64) + 3 * np.einsum("lir,lro->lio", a, b, dtype=np.float64)).astype(kept)
    assert array.dtype == plain.dtype == np.dtype(stored) and array.shape == (3, 6, 8)
    for place in ((), (0,), (2,)):
        assert array[place].dtype == plain[place].dtype == np.float32
        np.testing.assert_array_equal(plain[place], base[place].astype(kept).astype(np.float32))
        rtol = 1e-5 if kept == "float32" else 2**-7  # a step of bfloat16
        np.testing.assert_allclose(array[place], want[place].astype(np.float32), rtol=rtol, atol=1e-6)
        np.testing.assert_array_equal(array[place], array[()][place])
