"""Stage 5 with its roles in actors: the batches of a run in one process, whoever dies.

Actors are those of a stand-in for Ray, in threads of this process, behind pickle. Not covered: Ray and processes
(test_rl_ray), devices of an actor's own, clusters of several machines.
"""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.rl.pipeline import STAGES
from glmv_jax.train import main
from glmv_jax.train.stages import rl_workers
from glmv_jax.typing import UserError
from tests.random_params import switched_on
from tests.rl import ray_stand_in

SMALL = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.prompts=6", "rollout.group=4", "rollout.slots=8",
         "rollout.max_new_tokens=6", "data.ahead=0", "rollout.pipeline=async"]  # fmt: skip
EPISODES = ["rollout.environments=(('windows', 3.0),)", "rollout.max_new_tokens=8", "rollout.rows=(2,)",
            "rollout.episodes.rows=4", "rollout.episodes.turns=3", "data.tokens=1024", "data.patches=192",
            "data.targets=96"]  # fmt: skip
PARITY = {"parts": {"rule": {"kind": "rule", "rule": "tests.rl.rewards.hostile:parity"}}}
LONGER = {"group": {"comparator": {"kind": "rule", "rule": "tests.rl.rewards.hostile:says_more"}, "form": "equation9"}}
DEFAULT = {"num_cpus": 1.0, "num_gpus": 0.0, "resources": ()}
THERE = ["rollout.workers.rollout=2", "rollout.workers.reward=2"]


@pytest.fixture
def ray(monkeypatch):
    return ray_stand_in.installed(monkeypatch)


def build(folder, *more: str, compared: bool = False):
    folder.mkdir(exist_ok=True)
    cfg = config.load("experiments/rl_grpo.py:size=nano")
    cfg.rewards = {"workers": 1, "sources": {name: PARITY for name, weight in cfg.data.weights.items() if weight}}
    if compared:
        cfg.rewards.sources.count = LONGER
    cfg = config.override(cfg, [*SMALL, *more])
    cfg.faults = str(folder / "faults.jsonl")
    return main.stage_class("rl")(cfg)


def policies(stage, count: int) -> list:
    first = switched_on(stage.init_params(jax.random.key(0)))
    return [jax.tree.map(lambda x, n=n: x * (1.0 + 0.05 * n), first) for n in range(count)]


def run(stage, steps: int, state: dict | None = None, first: int = 0) -> tuple[list, list[dict], dict]:
    """The batches, what is told of each, and the state behind them."""
    batches, told = [], []
    data = stage.train_data()
    try:
        if state is not None:
            data.set_state(json.loads(json.dumps(state)))
        for step, params in list(enumerate(policies(stage, first + steps)))[first:]:
            batch, metrics = stage.next_batch(data, types.SimpleNamespace(params=params, step=step))
            batches.append(batch)
            told.append(metrics)
        return batches, told, data.get_state()
    finally:
        data.close()


def samples(folder) -> list[dict]:
    rows = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "sample"]


def equal(batches, others, exact: bool = True):
    for batch, other in zip(batches, others, strict=True):
        assert sorted(batch) == sorted(other) and (batch["advantage"] != 0).any()
        for name in batch:
            # What a slot had read before decides in which pieces it reads on, and so the last digit.
            close = {"atol": 1e-5} if name == "old_logprob" else {"atol": 0, "rtol": 0}
            np.testing.assert_allclose(batch[name], other[name], err_msg=name, **close)


def test_the_batches_are_those_of_one_process_whoever_dies(tmp_path, ray):
    """Answers, rewards (those that are compared in a group, too), and what is told of them."""
    wanted, metrics, _ = run(build(tmp_path / "here", "rollout.staleness=0", compared=True), 3)
    assert not ray.started
    ray.deaths = {("Rollout", "complete"): [5, 40], ("Reward", "grade"): [7], ("Reward", "compare"): [1]}
    got, told, _ = run(build(tmp_path / "there", "rollout.staleness=0", *THERE, compared=True), 3)
    equal(wanted, got)
    assert ray.up is None and len(ray.started["Rollout"]) == 4 and len(ray.started["Reward"]) == 4
    assert told[-1]["workers/lost/rollout"] == told[-1]["workers/lost/reward"] == 2.0
    assert told[-1]["workers/again/rollout"] > 2 and told[-1]["workers/again/reward"] >= 2
    same = [(row["uid"], row["member"], row["tokens"], row["versions"], row["images"], row["reward"])
            for row in samples(tmp_path / "here")]  # fmt: skip
    assert same == [(row["uid"], row["member"], row["tokens"], row["versions"], row["images"], row["reward"])
                    for row in samples(tmp_path / "there")]  # fmt: skip
    for here, there in zip(metrics, told):
        timed = {name for name in here if name.startswith("grading/seconds")}
        assert {n: there[n] for n in here.keys() - timed} == pytest.approx({n: here[n] for n in here.keys() - timed})
    trace = json.loads((tmp_path / "there" / "trace.json").read_text())
    assert {e["cat"] for e in trace["traceEvents"] if e["ph"] == "X"} == set(STAGES)


def test_a_sampler_in_each_of_two_processes_draws_for_all(tmp_path, ray):
    """Without slots: a moment's questions go to each in one call, and no two calls draw the same noise."""
    stage = build(tmp_path, "rollout.slots=0", "rollout.staleness=0", *THERE)
    calls = []
    sampled = type(stage.sampler).__call__

    def counted(self, params, prompts, key):
        calls.append((len(prompts.length), tuple(jax.random.key_data(key).tolist())))
        return sampled(self, params, prompts, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stage.sampler), "__call__", counted)
        run(stage, 2)
    assert [size for size, _ in calls] == [3] * 4, "half of a batch each"
    assert len({key for _, key in calls}) == 4
    rows = samples(tmp_path)
    assert [(row["uid"], row["member"]) for row in rows] == [(uid, i) for uid in range(12) for i in range(4)]
    assert len({tuple(row["tokens"]) for row in rows}) > 40


def test_what_was_stopped_goes_on_elsewhere_and_over_a_restart(tmp_path, ray):
    """None lost, none twice, none older than the bound; versions never fall along an answer."""
    settings = [*THERE, "rollout.staleness=2", "rollout.late=abort", "rollout.seconds=0.2", "rollout.in_flight=9",
                "rollout.max_new_tokens=40", "rollout.slots=2", "data.targets=400", "data.tokens=512"]  # fmt: skip
    ray.deaths = {("Rollout", "complete"): [60], ("Rollout", "abort"): [20]}
    _, _, state = run(build(tmp_path, *settings), 3)
    _, told, state = run(build(tmp_path, *settings), 3, state, first=3)
    rows = samples(tmp_path)
    uids = [row["uid"] for row in rows if row["member"] == 0]
    waiting = [group["prompt"]["uid"] for group in state["scheduler"]["groups"]]
    drawn = state["scheduler"]["prompts"]
    assert len(set(uids)) == len(uids) and sorted(uids + waiting) == list(range(drawn))
    assert any(len(set(row["versions"])) > 1 for row in rows), "some go on with other weights"
    for row in rows:
        assert row["versions"] == sorted(row["versions"]) and row["trained_at"] - row["versions"][0] <= 2
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert "aborted" in kinds and "failed" not in kinds


def test_episodes_are_those_of_one_process(tmp_path, ray):
    """Environments, turns, answers and grades each elsewhere; an engine that dies draws its turns again."""
    wanted, metrics, _ = run(build(tmp_path / "here", "rollout.staleness=0", *EPISODES), 2)
    more = [*THERE, "rollout.workers.environment=2"]
    ray.deaths = {("Rollout", "turn"): [9]}
    stage = build(tmp_path / "there", "rollout.staleness=0", *EPISODES, *more)
    got, told, _ = run(stage, 2)
    equal(wanted, got)
    assert not any(row["kind"] == "failed" for row in map(json.loads, open(tmp_path / "there" / "samples.jsonl")))
    assert told[-1]["workers/lost/rollout"] == 1.0 and told[-1]["workers/lost/environment"] == 0.0
    assert {"turns/windows", "reward/windows"} <= told[-1].keys()
    for name in ("reward/windows", "turns/windows", "grading/graded/windows"):
        assert [row[name] for row in told] == [row[name] for row in metrics]
    images = [row["images"] for row in samples(tmp_path / "there") if row["source"] == "windows"]
    assert images and all(images) and ray.calls["Environment", "step"] > 0
    assert images == [row["images"] for row in samples(tmp_path / "here") if row["source"] == "windows"]


def test_an_environment_that_is_gone_is_played_again(tmp_path, ray):
    ray.deaths = {("Environment", "step"): [4]}
    more = ["rollout.workers.environment=2", "rollout.workers.reward=1"]
    stage = build(tmp_path, "rollout.staleness=0", *EPISODES, *more)
    _, (told,), _ = run(stage, 1)
    assert told["workers/lost/environment"] == 1.0
    errors = [row["error"] for row in map(json.loads, open(tmp_path / "samples.jsonl")) if row["kind"] == "failed"]
    assert errors and all("WorkerLost" in error or "is gone" in error for error in errors)
    trained = [(row["uid"], row["member"]) for row in samples(tmp_path)]
    assert trained == [(uid, i) for uid in range(6) for i in range(4)]


def test_devices_are_those_that_are_reserved(tmp_path, ray):
    needs = ["rollout.workers.needs.rollout.num_gpus=0.5", "rollout.workers.needs.reward.resources=(('reward', 1.0),)"]
    ray.resources |= {"GPU": 1.0, "reward": 2.0}
    stage = build(tmp_path, *THERE, *needs)
    stage.roles.open()
    try:
        rollout, reward = ray.started["Rollout"][0], ray.started["Reward"][0]
        assert rollout["num_gpus"] == 0.5 and "runtime_env" not in rollout
        assert reward["resources"] == {"reward": 1.0}
        assert reward["runtime_env"] == {"env_vars": {"JAX_PLATFORMS": "cpu"}}, "no grader takes a device"
        assert ray.up["address"] == "local" and ray.up["num_cpus"] >= 4
    finally:
        stage.roles.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(UserError, match="on this machine, whose gpu devices the trainer has all; start it"):
            build(tmp_path, *THERE, *needs).roles.open()
        build(tmp_path, *THERE).roles._join({"rollout": rl_workers.options(DEFAULT, True)})  # which takes none
        ray.shutdown()
    ray.resources.pop("GPU")
    with pytest.raises(UserError, match="need more than there is here: GPU 0 of 1; lower rollout.workers.needs"):
        build(tmp_path, *THERE, *needs).roles.open()
    assert ray.up is None


def test_a_role_that_cannot_be_made_ends_the_run_at_once(tmp_path, ray, monkeypatch):
    stage = build(tmp_path, *THERE)
    monkeypatch.setattr("glmv_jax.rl.rewards.system.RewardSystem.check", _no_judge)
    with pytest.raises(UserError, match="a reward worker cannot be made in a process of its own: UserError: no judge"):
        stage.train_data()
    assert ray.up is None


def _no_judge(self):
    raise UserError("no judge")


def test_settings_that_do_not_go_with_them_are_refused(tmp_path, monkeypatch):
    for settings, match in (
        (["rollout.pipeline=sync"], "rollout.workers are of rollout.pipeline=async; set that, or rollout.workers.roll"),
        (["rollout.engine=http://127.0.0.1:1"], "rollout.engine and rollout.workers.rollout both draw the answers"),
        (["rollout.workers.environment=1"], "the run has no rollout.environments; set it to 0"),
        (["rollout.workers.reward=-1"], "numbers of processes, 0 for a role that is done here"),
    ):
        with pytest.raises(UserError, match=match):
            build(tmp_path, *THERE, *settings)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"need Ray: pip install 'glmv_jax\[rl\]'"):
        build(tmp_path, *THERE).train_data()
