"""Stage 5 with the asynchronous pipeline in threads: the synchronous batches when nothing may be stale, and a restart.

Not covered: the training step between the batches (it is that of the synchronous stage), and how much is gained.
"""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.rl import Grade
from glmv_jax.train import main
from glmv_jax.typing import UserError
from tests.inference.test_drafting import made_half_right
from tests.random_params import switched_on

SMALL = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.prompts=6", "rollout.group=4",
         "rollout.minibatches=1", "rollout.max_new_tokens=6", "data.ahead=0"]  # fmt: skip


def build(folder, *more: str, **rollout):
    cfg = config.override(config.load("experiments/rl_grpo.py:size=nano"), [*SMALL, *more])
    cfg.rollout.update(rollout)
    cfg.faults = str(folder / "faults.jsonl")
    stage = main.stage_class("rl")(cfg)
    stage.verifiers = dict.fromkeys(stage.names, by_parity)
    return stage


def by_parity(text, sample):
    value = float(len(text) % 2)
    return Grade(value, value == 1.0, {"format": 1.0, "score": value})


def policies(stage, count: int) -> list:
    """A few that differ, as training would make them."""
    first = stage.init_params(jax.random.key(0))
    return [jax.tree.map(lambda x, n=n: x * (1.0 + 0.05 * n), first) for n in range(count)]


def test_without_staleness_the_batches_are_the_synchronous_ones(tmp_path):
    sync, other = build(tmp_path), build(tmp_path, "rollout.pipeline=async", "rollout.staleness=0")
    data, beside = sync.train_data(), other.train_data()
    try:
        for step, params in enumerate(policies(sync, 3)):
            state = types.SimpleNamespace(params=params, step=step)
            wanted, metrics = sync.next_batch(data, state)
            got, others = other.next_batch(beside, state)
            assert sorted(got) == sorted(wanted) and (wanted["advantage"] != 0).any()
            for name in wanted:
                np.testing.assert_array_equal(got[name], wanted[name], err_msg=f"{name} of step {step}")
            assert {name: others[name] for name in metrics} == pytest.approx(metrics) and others["staleness/mean"] == 0
    finally:
        data.close()
        beside.close()
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {e["cat"] for e in trace["traceEvents"] if e["ph"] == "X"} >= {
        "rollout",
        "reward",
        "batch",
        "weights",
        "train",
    }


def test_a_restart_goes_on_with_what_was_not_trained_on(tmp_path):
    settings = "rollout.pipeline=async", "rollout.staleness=2", "rollout.quotas=source"
    stage = build(tmp_path, *settings)
    all_params = policies(stage, 6)

    def trained() -> list[dict]:
        lines = (tmp_path / "samples.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == "sample"]

    data = stage.train_data()
    for step in range(3):
        stage.next_batch(data, types.SimpleNamespace(params=all_params[step], step=step))
    saved = json.dumps(data.get_state())
    stage.next_batch(data, types.SimpleNamespace(params=all_params[3], step=3))  # trained on in vain
    data.close()
    assert len(trained()) == 4 * 24
    again = build(tmp_path, *settings)
    data = again.train_data()
    data.set_state(json.loads(saved))
    for step in range(3, 6):
        _, metrics = again.next_batch(data, types.SimpleNamespace(params=all_params[step], step=step))
        assert {metrics[f"groups/{name}"] for name in again.names} == {1.0}, "of six sources with six prompts a batch"
    drawn = data.get_state()["scheduler"]
    data.close()
    rows = trained()
    uids = [row["uid"] for row in rows if row["member"] == 0]
    waiting = [group["prompt"]["uid"] for group in drawn["groups"]]
    assert [row["step"] for row in rows] == [step for step in range(6) for _ in range(24)]
    assert len(set(uids)) == 36 and sorted(uids + waiting) == list(range(drawn["prompts"])), "none lost, none twice"
    ages = [row["trained_at"] - version for row in rows for version in row["versions"]]
    assert 0 < max(ages) <= 2
    with pytest.raises(ValueError, match="the weights are of version 5, the state of the pipeline of 3"):
        wrong = again.train_data()
        wrong.set_state(json.loads(saved))
        try:
            wrong.exchange(all_params[0], 5)
        finally:
            wrong.close()


@pytest.mark.parametrize("pipeline", ["async", "sync"])
def test_drafts_of_the_mtp_head_are_kept_and_the_log_probabilities_are_the_trainers(pipeline, tmp_path, monkeypatch):
    """That drawn answers keep the distribution of the model is tests/inference/test_drafting.py's."""
    made = build(tmp_path, f"rollout.pipeline={pipeline}", "rollout.staleness=0", "rollout.slots=8",
                 "rollout.proximal=true", "rollout.max_new_tokens=14", drafts=2)  # fmt: skip
    fronts, front = [], made.beside._front
    monkeypatch.setattr(made.beside, "_front", lambda *new: fronts.append(front(*new)) or fronts[0])
    params = jax.jit(lambda key: switched_on(made.init_params(key)))(jax.random.key(0))
    params = made_half_right(params, made.model.decoder.width, 0.08)
    data = made.train_data()
    try:
        for step in range(3):
            new = jax.tree.map(lambda x, by=1.0 + 0.02 * step: x * by, params)
            made.next_batch(data, types.SimpleNamespace(params=new, step=step))
        engine = fronts[0].engine if pipeline == "async" else made.drawing(params).engine
        counts = engine.counts.copy()
    finally:
        data.close()
    assert counts.accepted.sum() > 0.1 * counts.reached.sum() > 20, counts
    rows = [row for row in map(json.loads, (tmp_path / "samples.jsonl").open()) if "trained_logprobs" in row]
    assert len(rows) > 24
    for row in rows:
        assert set(row["versions"]) == {row["step"]} and len(row["trained_logprobs"]) == row["length"]
        np.testing.assert_allclose(row["logprobs"], row["trained_logprobs"], atol=1e-4)


def test_groups_whose_rewards_are_equal_are_replaced(tmp_path):
    stage = build(tmp_path, "rollout.pipeline=async", "rollout.dynamic=true")
    data = stage.train_data()
    try:
        batch, metrics = stage.next_batch(data, types.SimpleNamespace(params=policies(stage, 1)[0], step=0))
    finally:
        data.close()
    assert metrics["same/mean"] == 0.0 and metrics["filtered/mean"] > 0
    assert stage.counts(batch)["samples"] + round(metrics["left_out"] * 24) == 24


def test_settings_that_do_not_go_with_it_are_refused(tmp_path):
    with pytest.raises(UserError, match="'asynch' is not known; choose sync or async"):
        build(tmp_path, "rollout.pipeline=asynch")
    with pytest.raises(UserError, match="every batch of groups is one update; set minibatches=1"):
        build(tmp_path, "rollout.pipeline=async", "rollout.minibatches=2")
    for more in ((), ("rollout.pipeline=async",), ("rollout.pipeline=async", "rollout.slots=8", "rollout.engine=http://x")):
        with pytest.raises(UserError, match="rollout.drafts=2 are of an engine of the run's own; set rollout.slots"):
            build(tmp_path, *more, drafts=2)
    with pytest.raises(UserError, match="weights of its own for each depth"):
        build(tmp_path, "rollout.pipeline=async", "rollout.slots=8", "model.mtp.depth=2", "model.mtp.weights=per_depth",
              drafts=2)  # fmt: skip
    with pytest.raises(UserError, match="rollout.quotas='sources' is not known; choose one of '', 'form', 'source'"):
        build(tmp_path, "rollout.pipeline=async", "rollout.quotas=sources")
