"""Stage 5 with environments: groups of episodes beside questions or alone, drawn by the sampler or by the engine.

Windows here pay for what is said too, as an untrained policy presses nothing: groups without differences would not be
trained on. Not covered: that training on episodes improves a policy, and a browser.
"""

from __future__ import annotations

import asyncio
import dataclasses
import types

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.rl import Grade, envs
from glmv_jax.rl.envs.windows import Windows
from glmv_jax.rl.gym import Action
from glmv_jax.rl.pipeline import Completion, Prompt, Request
from glmv_jax.rl.play import Limits, play
from glmv_jax.rl.players import scripted
from glmv_jax.train import main
from glmv_jax.typing import UserError
from tests.random_params import switched_on

PAIRS = (("windows", 2.0), ("desk/count", 2.0), ("broken", 2.0))
SMALL = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.prompts=12", "rollout.group=3",
         "rollout.max_new_tokens=8", "rollout.rows=(2,)", "rollout.episodes.rows=4", "rollout.episodes.turns=3",
         "data.tokens=1024", "data.patches=192", "data.targets=96", "data.ahead=0",
         f"rollout.environments={PAIRS!r}"]  # fmt: skip
ALONE = [f"data.weights.{name}=0.0" for name in ("count", "name", "attribute", "spatial", "point", "chart")]
RULE = {"parts": {"rule": {"kind": "rule", "rule": "tests.rl.rewards.hostile:parity"}}}


class Paid(Windows):
    async def step(self, action):
        step = await super().step(action)
        return dataclasses.replace(step, reward=step.reward + len(action.text) % 2 / 4)


class Broken(Paid):
    """Fails where what is said has a length that 3 divides, however often it is tried."""

    source = "broken"

    async def step(self, action):
        if len(action.text) % 3 == 0:
            raise ConnectionError("gone")
        return await super().step(action)


def register(patch):
    patch.setitem(envs.FAMILIES, "windows", lambda name, split, seed: Paid(split, seed))
    patch.setitem(envs.FAMILIES, "broken", lambda name, split, seed: Broken(split, seed))


@pytest.fixture(autouse=True)
def families(monkeypatch):
    register(monkeypatch)


def build(*more: str, rewards: dict | None = None):
    cfg = config.load("experiments/rl_grpo.py:size=nano")
    cfg.rewards = rewards or {}
    made = main.stage_class("rl")(config.override(cfg, [*SMALL, *more]))
    fresh = made.init_params
    made.init_params = lambda key: switched_on(fresh(key))
    return made


@pytest.fixture(scope="module")
def learn():
    """(parameters, batch) -> (metrics, parameters after an update of the decoder), compiled once: all stages here have
    one objective, the same sources and, in all, six rows."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        made = build()

    @jax.jit
    def learn(params, batch):
        def loss(decoder):
            return made.loss(params | {"decoder": decoder}, {}, made.init_extra(), batch, jax.random.key(0))

        (_, (metrics, _)), grads = jax.value_and_grad(loss, has_aux=True)(params["decoder"])
        return metrics, params | {"decoder": jax.tree.map(lambda x, g: x - 0.05 * g, params["decoder"], grads)}

    return learn


def two_updates(made, learn):
    """[(batch, metrics of the rollouts, metrics of the loss)] of two updates, and the parameters before each."""
    params, found, before = made.init_params(jax.random.key(0)), [], []
    data = made.train_data()
    try:
        for step in range(2):
            batch, told = made.next_batch(data, types.SimpleNamespace(params=params, step=step))
            before.append(params)
            metrics, params = jax.device_get(learn(params, batch))
            found.append((batch, told, metrics))
    finally:
        data.close()
    return found, before


def drawn_by_these_weights(found, before, learn, sources):
    """The trainer finds the log-probabilities that the tokens were drawn with, of all these sources; other weights do
    not."""
    seen = set()
    for _, _, metrics in found:
        present = {name for name in sources if np.isfinite(metrics[f"mismatch_kl/{name}"])}
        assert all(metrics[f"mismatch_gap/{name}_max"] < 1e-4 for name in present)
        assert all(0 <= metrics[f"mismatch_kl/{name}"] < 1e-8 for name in present)
        seen |= present
    assert seen == set(sources)
    stale, _ = jax.device_get(learn(before[0], found[1][0]))
    assert max(stale[f"mismatch_gap/{name}_max"] for name in sources) > 1e-3


def test_episodes_and_questions_train_together(learn):
    """By the reward system; an environment that fails costs its own episodes and nothing else."""
    questions = list(config.load("experiments/rl_grpo.py:size=nano").data.weights)
    table = {"workers": 1, "sources": {name: RULE for name in (*questions, "desk/count")}}
    made = build(rewards=table)
    assert made.names[-3:] == ["windows", "desk/count", "broken"]
    assert (made.episodes.groups, made.episodes.questions) == (6, 6)
    (shape,) = made.batch_shapes()
    found, before = two_updates(made, learn)
    drawn_by_these_weights(found, before, learn, ["windows", "desk/count"])
    failed = episodes = 0
    for batch, told, _ in found:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in shape.items()
        }
        assert told["failed/windows"] == told["failed/desk/count"] == told["silent/windows"] == 0.0
        assert (batch["advantage"][2:] != 0).any(), "episodes are behind the questions, and teach"
        failed += told["failed/broken"]
        graded = sum(told[f"grading/graded/{name}"] for name in made.names[-3:])
        assert graded + told["failed/broken"] / made.cfg.rollout.episodes.tries == 6 * 3
        assert sum(told[f"grading/graded/{name}"] for name in questions) == 6 * 3
        assert told["error/mean"] == 0.0
        episodes += graded
    assert failed > 0 and episodes > 20
    told = {name: x for _, metrics, _ in found for name, x in metrics.items()}
    assert told["turns/windows"] == 3.0 and told["limited/windows"] == 1.0 and told["turns/desk/count"] >= 1.0
    assert 0 < told["reward/windows"] < 1 and 0 < told["length/windows"] <= 24
    assert made.grading.system is None


def test_the_asynchronous_form_draws_the_same_episodes_beside_questions(learn):
    """By the engine, with the weights of each step when nothing may be stale; graded in this process: by the
    environment's verdict, or as the task says. The synchronous form plays them alone."""
    two = ["rollout.environments=(('windows', 3.0), ('desk/count', 3.0))", "rollout.slots=4"]
    beside = build(*two, "rollout.pipeline=async", "rollout.staleness=0", "rollout.minibatches=1")
    assert (beside.episodes.groups, beside.episodes.questions) == (6, 6)
    (shape,) = beside.batch_shapes()
    found, before = two_updates(beside, learn)
    drawn_by_these_weights(found, before, learn, ["windows"])
    for batch, told, _ in found:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in shape.items()
        }
        assert told["staleness_max/mean"] == 0.0 and told["thrown_away/windows"] == 0.0
        assert any(f"reward/{name}" in told for name in beside.episodes.weights)
    alone = build(*ALONE, *two, "rollout.prompts=6", "rollout.minibatches=1")
    assert (alone.episodes.groups, alone.episodes.questions) == (6, 0)
    data = alone.train_data()
    try:
        for step, params in enumerate(before):
            wanted, metrics = alone.next_batch(data, types.SimpleNamespace(params=params, step=step))
            assert wanted["tokens"].shape == (4, 1024) and (wanted["advantage"] != 0).any()
            batch, told, _ = found[step]
            for name in wanted.keys() - {"source", "old_logprob"}:
                np.testing.assert_array_equal(batch[name][2:], wanted[name], err_msg=f"{name} of step {step}")
            # What a slot had read before decides in which pieces it reads on, and so the last digit.
            np.testing.assert_allclose(batch["old_logprob"][2:], wanted["old_logprob"], atol=1e-5)
            for name in (name for name in metrics if name.endswith(("/windows", "/desk/count"))):
                if not name.startswith(("failed", "silent")):
                    assert told[name] == pytest.approx(metrics[name]), name
    finally:
        data.close()
    assert alone.episodes.players._front is None, "closed with the data"


def test_groups_that_lost_episodes_are_compared_among_what_is_left():
    """Rewards of three groups, of which one is whole, one lost a member and one two: nobody is compared with that."""
    rewards = {0: [1.0, 0.0, 0.5], 1: [0.25, 0.75], 2: [1.0]}
    records = [
        types.SimpleNamespace(row=row, grade=Grade(reward, False, {}), truncated=False, answer=np.zeros(4))
        for row, group in rewards.items()
        for reward in group
    ]
    updates, advantages = build("rollout.minibatches=2").episodes._learnt([records[n] for n in (3, 0, 5, 1, 4, 2)])
    assert [sorted(of) for of in updates] == [[1, 3, 5], [0, 4]]
    compared = [np.array(group) for group in rewards.values() if len(group) > 1]
    wanted = np.concatenate([(x - x.mean()) / (x.std(ddof=1) + 1e-6) for x in compared])
    np.testing.assert_allclose(advantages[[1, 3, 5, 0, 4]], wanted, rtol=1e-5)
    assert advantages[2] == 0.0


def test_the_episodes_of_a_group_are_compared_in_both_forms():
    """By rules that see what the environment gave, or the question; one without an answer is worst of all. Rewards are
    counted here from the ranks."""
    ruled = {"kind": "rule", "rule": "tests.rl.rewards.hostile:"}
    table = {"workers": 1, "sources": {
        "windows": {"group": {"comparator": ruled | {"rule": ruled["rule"] + "earns_and_says"}, "limit": 20.0}},
        "desk/count": {"group": {"comparator": ruled | {"rule": ruled["rule"] + "says_more"}, "form": "equation9"}},
    }}  # fmt: skip
    made = build(*ALONE, rewards=table)
    made.grading.open()
    form, said = made.episodes._form, ("hm", "hmmm", "", "hmm", "hmmm")

    def played(name, turns):
        policy = lambda text: scripted(lambda: Action(text))  # noqa: E731
        return [asyncio.run(play(envs.make(name), policy(text), 3, form, Limits(turns))) for text in said]

    async def beside(episodes):
        grade = made.grading.answers(None)
        prompt = Prompt(0, {"environment": "any", "seed": 3}, episodes[0].source)
        asked = [Request(n, prompt, n) for n in range(len(said))]
        return await asyncio.gather(*(grade(one, Completion(None, "stop", {}, e)) for one, e in zip(asked, episodes)))

    try:
        made.cfg.rollout.group = len(said)
        for name, turns in (("windows", 2), ("desk/count", 2)):
            episodes = played(name, turns)
            if name == "desk/count":  # as one that met a limit is
                episodes[3] = dataclasses.replace(episodes[3], ended="tokens", info={})
            scores = [100 * (e.reward or 0.0) + len(e.text) for e in episodes]
            pool = [n for n, e in enumerate(episodes) if e.reward is not None or e.sample is not None]
            first, tie = (1.0, 0.5) if name == "windows" else (0.0, 0.0)
            wanted = [-1.0] * len(said)
            for n in pool:
                rest = [scores[m] for m in pool if m != n]
                wanted[n] = first + sum((scores[n] > x) + tie * (scores[n] == x) for x in rest)
            assert len(set(wanted)) > 3
            grades = [asyncio.run(made.grading.episode(episode)) for episode in episodes]
            assert [g.reward for g in asyncio.run(made.grading.compared(episodes, grades))] == wanted
            assert [g.reward for g in asyncio.run(beside(episodes))] == wanted
    finally:
        made.grading.close()
    table["sources"]["windows"]["group"]["polish"] = True
    with pytest.raises(UserError, match="no sample to show to a judge or a renderer"):
        build(*ALONE, rewards=table)


def test_a_restart_plays_the_episodes_that_come_next():
    made = build(*ALONE)
    data = made.train_data()
    first = [next(data)["episodes"] for _ in range(3)]
    groups = [made.episodes.group(n) for n in range(first[0], first[-1] + 12)]
    assert len({seed for _, seed in groups}) == 3 * 12 and {name for name, _ in groups} == {
        "windows",
        "desk/count",
        "broken",
    }
    again = made.train_data()
    for _ in range(2):
        next(again)
    state = again.get_state()
    other = made.train_data()
    other.set_state(state)
    assert next(other)["episodes"] == first[2] == 24
    mixed = build()
    data = mixed.train_data()
    first, state, second = next(data), data.get_state(), next(data)
    data.set_state(state)
    np.testing.assert_array_equal(next(data)["tokens"], second["tokens"])
    assert first["tokens"].shape[0] == 6 and (first["episodes"], second["episodes"]) == (0, 6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["rollout.pipeline=async", "rollout.minibatches=1"], "rollout.slots, 8 say, or rollout.pipeline=sync"),
        (["rollout.episodes.rows=0"], "episodes need rows"),
        (["rollout.episodes.turns=20"], "20 turns of 8 tokens are 160, and rows learn 96"),
        (["rollout.episodes.tokens=4096"], "raise data.tokens"),
        (["rollout.environments=(('windw', 1.0),)"], "of no family that there is"),
        (["rollout.environments=(('windows', 0.0),)"], "weights are above 0"),
        (["rollout.environments=(('windows', 1.0, {'colour': 1}),)"], "unexpected keyword argument 'colour'"),
        (["rollout.environments=(('gymnasium/FrozenLake-v1', 1.0, {'actions': ('up',)}),)"], "and 1 names have no"),
        (["rollout.overlong.buffer=4"], "rollout.overlong.buffer=0"),
        (["rollout.prompts=1"], "cannot be shared"),
    ],
)
def test_settings_that_do_not_go_with_episodes_are_refused(more, message):
    with pytest.raises(UserError, match=message):
        build(*more)
