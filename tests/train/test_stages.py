"""The five stages as they are configured: one update on 1 and on 8 emulated devices, and what each promises.

Small towers (two layers) and the shipped corpus. Not covered: whether a stage learns; the quickstart shows that.
"""

from __future__ import annotations

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glmv_jax import config, models, optim
from glmv_jax.data import emoji
from glmv_jax.eval import drafts
from glmv_jax.inference.engine import Engine
from glmv_jax.losses.cross_entropy import cross_entropy, next_targets
from glmv_jax.losses.mtp import mtp_loss
from glmv_jax.models import vlm
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.rl import Grade
from glmv_jax.rl.batch import to_batch
from glmv_jax.rl.integrity import checked
from glmv_jax.train import main
from glmv_jax.train import state as state_lib
from glmv_jax.train.stages.vlm import inputs
from glmv_jax.train.step import make_train_step
from glmv_jax.typing import UserError
from tests.random_params import switched_on

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
SMALL = {
    "mim": ("experiments/cogvit_mim.py", ["model.vision.depth=2", "teachers.semantic.kind=hog", "batch=16"]),
    "siglip": ("experiments/cogvit_siglip.py", ["model.vision.depth=2", "model.text.depth=1", "batch=32"]),
    "pretrain": ("experiments/vlm_pretrain.py", ["model.vision.depth=2", "model.decoder.depth=2", "batch=8"]),
    "sft": ("experiments/vlm_sft.py", ["model.vision.depth=2", "model.decoder.depth=2", "batch=8"]),
    "rl": ("experiments/rl_grpo.py", ["model.vision.depth=2", "model.decoder.depth=2", "rollout.prompts=8",
                                      "rollout.group=4", "rollout.minibatches=1", "rollout.max_new_tokens=6"]),
}  # fmt: skip
TRAINED_ENCODER = ((r"mtp/.*", {"kind": "frozen"}), *config.presets.vlm_groups(vision=0.5))


def build(name: str, *more: str):
    file, overrides = SMALL[name]
    cfg = config.load(f"{file}:size=nano")
    if name == "mim":  # no run to take a tower from here
        cfg.teachers.semantic = {"kind": "hog", "bins": 6, "weight": 1.0}
        overrides = [o for o in overrides if not o.startswith("teachers")]
    if name == "rl":  # the encoder too, as beyond nano
        cfg.optim.groups = TRAINED_ENCODER
    # Muon and Adam divide a gradient by its own size: where it is as small as Adam's eps (1e-8) its rounding comes
    # out as a few per cent of the learning rate (2e-5 at 5e-4 was seen). One small rate for all keeps that below 1e-5;
    # a wrong gradient would differ by the rate itself, 1e-4. Gradients themselves: tests/parallel/test_rules.py.
    stage = main.stage_class(name)(config.override(cfg, [*overrides, "optim.lr=1e-4", *more]))
    fresh = stage.init_params
    stage.init_params = jax.jit(lambda key: switched_on(fresh(key)))
    return stage


def one_batch(stage):
    """A training batch; for rl, rollouts of the untrained policy with made-up advantages (its rewards are all 0)."""
    data = stage.train_data()
    if stage.name != "rl":
        return next(data)
    prompts = next(data)
    records = [r for r in _rollouts(stage, prompts)]
    advantages = np.random.default_rng(0).normal(size=len(records)).astype(np.float32)
    d = stage.cfg.data
    rows, left_out = to_batch(
        records, prompts, advantages, rows=(16,), tokens=d.tokens, patches=d.patches, names=stage.names
    )
    assert not left_out
    return checked(rows)


def _rollouts(stage, prompts):
    from glmv_jax.rl.rollout import rollout

    params = stage.init_params(jax.random.key(0))
    return rollout(stage.sampler, params, prompts, jax.random.key(1), stage.tokenizer, stage.grading.score)


def update(stage, batch, sizes: dict[str, int], rules: str):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh, preset = mesh_lib.make_mesh(sizes, devices), rules_lib.preset(rules)
    shapes = jax.eval_shape(stage.init_params, jax.random.key(0))
    optimizer = optim.build(stage.cfg.optim, shapes, 10, preset.shardings(mesh, stage.logical_axes(), shapes))
    placement = state_lib.place(stage, optimizer, mesh, preset)
    state = state_lib.init_state(stage, optimizer, placement, 0)
    step = make_train_step(stage, optimizer, placement, trainable=optim.trainable(stage.cfg.optim, shapes))
    constants = jax.device_put(stage.constants(), placement.constants)
    state, metrics = step(state, constants, placement.batch(batch))
    assert step.traces == 1
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.fixture(scope="module")
def policy():
    """(stage 5, its untrained parameters): the sampler is compiled once. Groups of three, see below."""
    stage = build("rl", "rollout.group=3")
    return stage, stage.init_params(jax.random.key(0))


@pytest.fixture(scope="module")
def answers(policy):
    """A batch of stage 5."""
    return one_batch(policy[0])


@needs_8
@pytest.mark.parametrize("name", SMALL)
def test_one_update_on_1_and_on_8_devices(name, request):
    stage = request.getfixturevalue("policy")[0] if name == "rl" else build(name)
    batch = request.getfixturevalue("answers") if name == "rl" else one_batch(stage)
    alone, metrics = update(stage, batch, {"data": 1}, "data")
    split = {"sft": ({"data": 2, "fsdp": 4}, "fsdp"), "pretrain": ({"stage": 2, "data": 2}, "data")}
    many, many_metrics = update(stage, batch, *split.get(name, ({"data": 8}, "data")))
    for key in metrics:
        np.testing.assert_allclose(many_metrics[key], metrics[key], rtol=1e-4, atol=1e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, many)
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0


@needs_8
def test_a_mesh_with_stages_and_its_schedule_come_from_the_config():
    stage = build("pretrain", "pipeline.repeats=2", "pipeline.microbatches=4")
    stage.cfg.mesh = {"stage": 2, "data": 4}
    mesh, rules = stage.place()
    assert mesh.shape == {"stage": 2, "data": 4} and (rules.repeats, rules.microbatches, rules.ends) == (2, 4, "rows")


@pytest.fixture(scope="module")
def plain_siglip():
    """(a batch of stage 2, the parameters after its update by the plain form on one device, what that says)."""
    stage = build("siglip")
    batch = one_batch(stage)
    return batch, *update(stage, batch, {"data": 1}, "data")


@needs_8
@pytest.mark.parametrize("impl, sizes, rules", [("ring_bidir", {"data": 2, "fsdp": 4}, "fsdp"),
                                                ("allgather_chunked", {"data": 8}, "data")])  # fmt: skip
def test_stage_2_as_it_is_at_scale(impl, sizes, rules, plain_siglip):
    """The loss over many devices and rows embedded two at a time: the update of the plain form on one device."""
    batch, alone, metrics = plain_siglip
    large = build("siglip", f"loss.impl={impl}", "loss.positions=100", "loss.chunk=3")
    many, many_metrics = update(large, batch, sizes, rules)
    for key in metrics:
        np.testing.assert_allclose(many_metrics[key], metrics[key], rtol=1e-4, atol=1e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, many)


def test_stage_1_counts_masked_patches_or_all():
    losses = {}
    for on in ("masked", "all"):
        stage = build("mim", f"loss.on={on}", "loss.mse=1.0")
        batch, params = one_batch(stage), stage.init_params(jax.random.key(0))
        losses[on] = float(jax.jit(stage.loss)(params, stage.constants(), stage.init_extra(), batch, None)[0])
    assert losses["masked"] != pytest.approx(losses["all"], rel=1e-3)
    with pytest.raises(UserError, match="loss.on='mask' is not known; choose masked or all"):
        build("mim", "loss.on=mask")
    nobody = config.load("experiments/cogvit_mim.py:size=nano,semantic=false,texture=false")
    with pytest.raises(UserError, match="stage 1 has no teacher"):
        main.stage_class("mim")(nobody)


def test_shapes_that_are_compiled_ahead_are_those_that_come():
    with pytest.raises(UserError, match="data.lengths=.16, 32. and .*: give each once, with a share"):
        build("siglip", "data.lengths=(16, 32)")
    stage = build("siglip", "data.lengths=(16, 32, 48)", "data.length_shares=(1.0, 1.0, 1.0)")
    shapes = {length: b for length, b in zip((16, 32, 48), stage.batch_shapes(), strict=True)}
    assert stage.shape_buckets == 3
    data = stage.train_data()
    for _ in range(6):
        batch = next(data)
        expected = shapes[batch["frame"].shape[1]]
        of = lambda arrays: {k: (v.shape, v.dtype) for k, v in arrays.items() if k not in stage.host_only}  # noqa: E731
        assert of(batch) == of(expected) and not set(stage.host_only) & set(expected)


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_no_learnt_token_is_cut(name):
    """The packer's bound on learnt tokens is the one that the loss makes logits for."""
    stage = build(name)
    data = stage.train_data()
    for _ in range(5):
        assert ((next(data)["loss_weight"] > 0).sum(1) <= stage.cfg.data.targets).all()


@pytest.mark.parametrize("name", ["pretrain", "rl"])
def test_heldout_numbers_are_those_of_logits_at_every_token(name):
    """The stage computes logits at learnt tokens only; here they are computed everywhere, and weighted. Stage 5 has no
    loss of drafts, but measures them."""
    stage = main.stage_class(name)(config.override(build(name).cfg, ["eval.documents=2"]))
    params = stage.init_params(jax.random.key(0))
    # A random model is never right about 4,096 tokens; one that knows the eight commonest only is now and then.
    learnt = np.concatenate([batch["tokens"][batch["loss_weight"] > 0] for batch in stage._heldout])
    common = np.argsort(-np.bincount(learnt, minlength=stage.tokenizer.vocab_size))[:8]
    head = params["decoder"]["head"]
    params["decoder"]["head"] = jnp.zeros_like(head).at[:, common].set(head[:, common])

    @jax.jit
    def everywhere(params, vision, tokens):
        out = vlm.apply(stage.model, params, vision, tokens)
        states = [out.hidden, *vlm.mtp_hidden(stage.model, params, out, tokens)[0]]
        logits, *drafts = (vlm.logits(stage.model, params, h_BTD) for h_BTD in states)
        return logits, drafts

    sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for batch in stage._heldout:
        vision, tokens = inputs(batch)
        logits, drafts = everywhere(params, vision, tokens)
        is_image, behind = tokens.image_row >= 0, _behind_image(batch)
        for suffix, counts in (("", True), (" in text alone", ~behind), (" behind images", behind)):
            learnt_BT = tokens.loss_weight * counts
            targets, weight = next_targets(tokens.tokens, learnt_BT, tokens.segments)
            loss = cross_entropy(logits, targets, weight)
            mtp = mtp_loss(drafts, tokens.tokens, tokens.segments, learnt_BT, is_image, main_logits_BTV=logits)
            found = {"loss": (loss.loss, loss.weight), "mtp": (mtp.loss_K[0], mtp.weight_K[0]),
                     "mtp_accuracy": (mtp.accuracy_K[0], mtp.weight_K[0]),
                     "mtp_agreement": (mtp.agreement_K[0], mtp.weight_K[0])}  # fmt: skip
            for name, (value, weight) in found.items():
                sums[f"heldout {name}{suffix}"] += float(value) * float(weight), float(weight)
    assert stage.heads == 2  # so the mean over depths is that of the first
    found = stage.heldout_loss(params)
    names = ["heldout mtp_accuracy", "heldout mtp_agreement"]
    names += [f"heldout {name}{where}" for name in ("loss", "mtp") for where in ("", " behind images")]
    if "text" in stage.names:
        names += ["heldout loss in text alone", "heldout mtp in text alone"]
    assert all(sums[name][0] for name in names) and {*names, "heldout loss without image"} == set(found)
    np.testing.assert_allclose([found[name] for name in names], [sums[n][0] / sums[n][1] for n in names], rtol=1e-5)


def _behind_image(batch):
    """Token by token: is there an image before it in its segment."""
    behind = np.zeros(batch["tokens"].shape, bool)
    for b, t in np.ndindex(*behind.shape):
        same = batch["segments"][b, :t] == batch["segments"][b, t]
        behind[b, t] = batch["segments"][b, t] and (same & (batch["image_row"][b, :t] >= 0)).any()
    return behind


def test_accept_lengths_of_a_stage_are_measured_where_it_asks_for_drafts():
    """A head that always says what the backbone says has every draft kept: K + 1 tokens a pass but at the end."""
    stage = main.stage_class("pretrain")(config.override(build("pretrain").cfg, ["eval.documents=2", "eval.drafts=2"]))
    params = stage.init_params(jax.random.key(0))
    made = stage.engine(params, 2, stage.builder.max_tokens, drafts.NEW, drafts=2)
    whole = dataclasses.replace(made.sampling, stop=())  # so that answers are whole
    stage._drafting = Engine(stage.model, None, whole, made.settings)
    found = stage.evaluate(params, {}, full=True)
    assert {f"accept length {kind}" for kind in ("text", "image")} <= set(found)
    constant = jax.tree.map(jnp.zeros_like, params["decoder"]["norm"])  # every hidden state 0: the first token wins
    params["decoder"]["norm"], params["mtp"]["norm"] = constant, jax.tree.map(jnp.zeros_like, params["mtp"]["norm"])
    lengths = stage.accept_lengths(params)
    assert all(2.5 < length <= 3 for length in lengths.values()), lengths
    assert not any("accept" in name for name in stage.evaluate(params, {}, full=False))


def test_what_is_trained_on_is_counted_by_source():
    """Against a count token by token; of stage 5 samples are answers, which share the tokens of their prompt."""
    stage = build("pretrain")
    batch, wanted = next(stage.train_data()), {}
    for source_T, segments_T in zip(batch["source"], batch["segments"]):
        for segment in set(segments_T[segments_T > 0]):
            (source,) = set(source_T[segments_T == segment])
            row = wanted.setdefault(stage.names[source], {"samples": 0, "tokens": 0})
            row["samples"] += 1
            row["tokens"] += int((segments_T == segment).sum())
    assert len(wanted) > 3 and stage.counts_by_source(batch) == wanted
    assert sum(row["samples"] for row in wanted.values()) == stage.counts(batch)["samples"]

    stage = build("mim", "data.weights.natural=0.5", "data.weights.scientific=0.5")
    batch = next(stage.train_data())
    found, names = stage.counts_by_source(batch), list(stage.cfg.data.weights)
    assert {name: row["samples"] for name, row in found.items()} == collections.Counter(
        names[n] for n in batch["source"].tolist()) and len(found) > 1  # fmt: skip
    assert {what: sum(row[what] for row in found.values()) for what in ("samples", "tokens")} == stage.counts(batch)

    stage = build("siglip", "data.basics=0.5")
    batch = next(stage.train_data())
    basics = int((batch["concept"] >= len(emoji.load())).sum())
    found = stage.counts_by_source(batch)
    emojis = stage.cfg.batch - basics
    assert {name: row["samples"] for name, row in found.items()} == {"emoji": emojis, "basics": basics}
    assert {what: sum(row[what] for row in found.values()) for what in ("samples", "tokens")} == stage.counts(batch)

    stage = build("rl")
    rows = {"source": [[0, 0, 0, 0, 0, 2, 2, -1]], "branches": [[0, 0, 1, 2, 2, 0, 3, 0]]}
    batch = {name: np.array(row) for name, row in rows.items()} | {"segments": np.array([[1] * 5 + [2] * 2 + [0]])}
    first, _, third, *_ = stage.names
    assert stage.counts_by_source(batch) == {first: {"samples": 2, "tokens": 5}, third: {"samples": 1, "tokens": 2}}


def next_batch(policy):
    """What a fresh run of stage 5 makes its first update of, and what it says of that."""
    stage, params = policy
    data = stage.train_data()
    try:
        return stage.next_batch(data, types.SimpleNamespace(params=params, step=0))
    finally:
        data.close()


def test_rl_packs_only_groups_whose_rewards_differ(policy):
    """An untrained policy earns nothing: no row is filled, and the update leaves the weights as they are."""
    stage, params = policy
    batch, metrics = next_batch(policy)
    assert metrics["same/mean"] == 1.0 and batch["tokens"].shape[0] == stage.rows[0] and not batch["segments"].any()
    gradient = jax.jit(jax.value_and_grad(lambda p, batch: stage.loss(p, {}, {}, batch, jax.random.key(0))[0]))
    loss, grads = gradient(params, batch)
    assert loss == 0.0 and all(not np.any(g) for g in jax.tree.leaves(grads))


def test_rl_takes_equal_rewards_for_equal(policy, monkeypatch):
    """Three times 0.1 has a deviation of 1e-17 in floating point."""
    grade = Grade(0.1, False, {"format": 1.0, "score": 0.0})
    monkeypatch.setattr(policy[0], "verifiers", dict.fromkeys(policy[0].names, lambda text, sample: grade))
    batch, metrics = next_batch(policy)
    assert metrics["same/mean"] == 1.0 and metrics["left_out"] == 0.0 and not batch["segments"].any()


def test_rl_packs_whole_groups(policy, monkeypatch):
    stage = policy[0]
    monkeypatch.setattr(stage, "verifiers", {name: _by_parity for name in stage.names})
    batch, metrics = next_batch(policy)
    answers = stage.counts(batch)["samples"]
    assert answers % 3 == 0 and 0 < answers <= 18 and 0.25 <= metrics["same/mean"] < 1
    assert (batch["advantage"][batch["loss_weight"] > 0] != 0).any()


def _by_parity(text, sample):
    """A grader that pays for texts of odd length, but never in two of the tasks."""
    value = float(len(text) % 2 and sample.source not in ("count", "chart"))
    return Grade(value, value == 1.0, {"format": 1.0, "score": value})


def test_the_policy_starts_at_ratio_one(policy, answers):
    """The trainer's log-probabilities on packed rows are the sampler's: the first update's ratio is 1."""
    stage, params = policy
    _, (metrics, _) = jax.jit(stage.loss)(params, {}, {}, answers, jax.random.key(0))
    np.testing.assert_allclose(metrics["ratio"], 1.0, atol=1e-4)
    np.testing.assert_allclose(metrics["ratio_max"], 1.0, atol=1e-3)


def test_pictures_of_prompts_may_keep_their_size():
    """A picture of a question is smaller than the budget: "naflex" fills it, "smart" leaves the picture as it is."""
    patches = {}
    for sizing in ("naflex", "smart"):
        stage = build("rl", f"data.sizing={sizing}", "data.image_patches=256", "data.prompt_tokens=128")
        assert stage.builder.patcher == stage.asker.patcher
        data = stage.train_data()
        patches[sizing] = (next(data)["frame"] > 0).sum(axis=1)
        data.close()
    assert (4 * patches["smart"] < patches["naflex"]).all() and patches["naflex"].min() >= 200
    with pytest.raises(UserError, match="unknown image sizing policy 'large'"):
        build("rl", "data.sizing=large")


def test_rl_counts_what_a_frozen_encoder_spares():
    """One forward pass instead of a forward and a backward of twice the cost; the draft head is never run."""
    frozen = main.stage_class("rl")(config.load("experiments/rl_grpo.py:size=nano"))
    trained = main.stage_class("rl")(config.override(frozen.cfg.copy_and_resolve_references(),
                                                     [f"optim.groups={TRAINED_ENCODER!r}"]))  # fmt: skip
    batch = {"tokens": np.zeros((16, 256)), "frame": np.zeros((16, 128))}
    model, vision = frozen.model, 16 * frozen.model.vision.flops(128)
    assert not frozen.trains_encoder and trained.trains_encoder
    assert trained.flops(batch) - frozen.flops(batch) == pytest.approx(2 * vision)
    drafts = model.mtp.flops(16 * 256, 128)
    assert trained.flops(batch) == pytest.approx(3 * (model.flops(16 * 256, 128, 16, 128) - drafts))


# --- a batch in pieces ------------------------------------------------------------------------------------------------


class TalkingBlock(models.block.Block):
    """A block that says how large its output is, as one with experts says how they are loaded."""

    def __call__(self, *args):
        x_BTD, (cache, _) = super().__call__(*args)
        return x_BTD, (cache, {"size": jnp.mean(jnp.square(x_BTD))})


def gradient(stage, batch, sizes):
    """(gradient, metrics) of a step: what plain gradient descent at rate 1 takes off the parameters."""
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    placement = state_lib.place(stage, optax.sgd(1.0), mesh, rules_lib.preset("data"))
    state = state_lib.init_state(stage, optax.sgd(1.0), placement, 0)
    before = jax.device_get(state.params)
    state, metrics = make_train_step(stage, optax.sgd(1.0), placement)(state, {}, placement.batch(batch))
    return jax.tree.map(np.subtract, before, jax.device_get(state.params)), jax.device_get(metrics)


@pytest.fixture(scope="module")
def uneven():
    """Rows of very unlike numbers of learnt tokens: none in the first, half of them in the second."""
    batch = one_batch(build("sft", "model.vision.depth=1", "model.decoder.depth=1"))
    batch["loss_weight"][0] = 0
    learnt = np.flatnonzero(batch["loss_weight"][1])
    batch["loss_weight"][1, learnt[::2]] = 0
    rng = np.random.default_rng(0)
    shape = batch["tokens"].shape
    return batch | {
        "advantage": rng.normal(size=shape).astype(np.float32),
        "old_logprob": -8.0 + 0.3 * rng.normal(size=shape).astype(np.float32),
    }


@needs_8
@pytest.mark.parametrize("name", ["sft", "rl"])
def test_pieces_of_a_batch_give_the_gradient_of_the_batch(name, uneven, monkeypatch):
    """Loss, metrics by source and gradients to 1e-6; for sft with two drafts, an auxiliary loss of the blocks, and a
    source that is in no row."""
    monkeypatch.setattr(models.block.BlockConfig, "layer", TalkingBlock)

    def stage(pieces):
        more = ["model.mtp.depth=2"] if name == "sft" else []
        made = build(name, "model.vision.depth=1", "model.decoder.depth=1", f"accumulate={pieces}", *more)
        with made.cfg.ignore_type(), made.cfg.unlocked():
            made.cfg.loss.aux = {"size": 0.01}
        return made

    source = uneven["source"]
    uneven = uneven | {"source": np.where(source == 0, 1, source)}
    want, metrics = gradient(stage(1), uneven, {"data": 1})
    absent = f"ce/{stage(1).names[0]}"
    assert name == "rl" or [key for key in metrics if np.isnan(metrics[key])] == [absent]
    assert metrics["loss"] != 0 and metrics["skipped"] == 0 and ("aux/size" in metrics) == (name == "sft")
    got, other = gradient(stage(2), uneven, {"data": 4})
    for key in metrics:
        np.testing.assert_allclose(other[key], metrics[key], rtol=2e-6, atol=1e-6, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_a_batch_that_cannot_be_cut_is_refused(uneven):
    with pytest.raises(UserError, match="accumulate=2: the loss of stage siglip is one of whole batches"):
        build("siglip").whole({}, 2)
    odd = build("sft", "model.vision.depth=1", "model.decoder.depth=1", "accumulate=3")
    with pytest.raises(UserError, match="batch=8 does not divide into accumulate=3 pieces over 2 data shards; try 12"):
        gradient(odd, uneven, {"data": 2})
    with pytest.raises(UserError, match="accumulate=0: a batch has at least one piece"):
        gradient(build("sft", "accumulate=0"), uneven, {"data": 1})


def test_an_auxiliary_loss_that_no_block_has_is_named(uneven):
    stage = build("sft", "model.vision.depth=1", "model.decoder.depth=1")
    with stage.cfg.ignore_type(), stage.cfg.unlocked():
        stage.cfg.loss.aux = {"balance": 0.01}
    params = jax.eval_shape(stage.init_params, jax.random.key(0))
    with pytest.raises(UserError, match="loss.aux.balance: no block of this model says that; they say nothing"):
        jax.eval_shape(stage.supervised, params, uneven)


def test_a_placeholder_is_never_learnt(uneven):
    """Even where data would weigh it: every weight is 1 here."""
    stage = build("sft", "model.vision.depth=1", "model.decoder.depth=1")
    _, tokens = inputs(uneven | {"loss_weight": np.ones_like(uneven["loss_weight"])})
    targets = stage._targets(tokens)
    image = np.take_along_axis(np.asarray(tokens.image_row) >= 0, np.asarray(targets.at_BJ), axis=1)
    assert (np.asarray(tokens.image_row) >= 0).any() and not (image & (np.asarray(targets.weight_BJ) > 0)).any()
