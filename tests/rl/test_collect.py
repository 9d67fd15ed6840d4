"""Groups of episodes: order, how many play at once, what a spoilt episode costs, and grades as episodes end."""

from __future__ import annotations

import asyncio
import collections
import functools
from types import SimpleNamespace

import numpy as np
import pytest

from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.rl import envs, metrics
from glmv_jax.rl.arena import Arena
from glmv_jax.rl.collect import collect
from glmv_jax.rl.envs import oracles
from glmv_jax.rl.envs.windows import Windows
from glmv_jax.rl.episodes import to_rows, verdict
from glmv_jax.rl.gym import Action
from glmv_jax.rl.play import Limits
from glmv_jax.rl.players import scripted, served
from glmv_jax.rl.rewards import Grade
from glmv_jax.rl.rewards.system import RewardSystem
from glmv_jax.rl.transcript import Form

FORM = Form(Tokenizer(), Patcher(max_patches=64))
LIMITS = Limits(turns=6, tokens=6000)


class Watched(Windows):
    """Windows that count who is at work, and break when they are told to."""

    working = most = made = closed = 0
    breaks: collections.Counter = collections.Counter()  # by seed, how often

    def __init__(self):
        super().__init__()
        type(self).made += 1

    def reset(self, seed):
        self.seed = seed
        return super().reset(seed)

    async def step(self, action):
        kind = type(self)
        kind.working += 1
        kind.most = max(kind.most, kind.working)
        await asyncio.sleep(0.001)
        kind.working -= 1
        if kind.breaks[self.seed] > 0:
            kind.breaks[self.seed] -= 1
            raise ConnectionError("gone")
        return await super().step(action)

    def close(self):
        type(self).closed += 1


async def graded(episode):
    return verdict(episode)


def collected(kind, **options):
    """The first of each group does what is wanted, the others press at once."""

    def policy(seed, member):
        environment = Windows()
        environment.reset(seed)
        plan = [oracles.call(each["name"], **each["arguments"]) for each in environment.solution]
        plan = plan if member == 0 else plan[-1:]
        return scripted(lambda: plan.pop(0) if plan else Action("?"))

    return gathered(kind, policy, graded, [3, 1, 2], size=3, limits=LIMITS, **options)


def gathered(make, policy, grade, seeds, parallel=8, **options):
    """All in environments of one name, which are closed in the end."""
    arena = Arena(lambda name: make(), parallel)
    try:
        return asyncio.run(collect(arena, policy, grade, [("it", seed) for seed in seeds], FORM, **options))
    finally:
        arena.close()


def test_groups_come_in_order_and_no_more_play_than_may():
    class Kind(Watched):
        most = made = closed = 0

    out = collected(Kind, parallel=4)
    assert [(r.id, r.row) for r in out.records] == [(f"windows/{s}", n) for n, s in enumerate((3, 1, 2)) for _ in "abc"]
    assert [r.grade.reward for r in out.records] == [1.0, 0.0, 0.0] * 3
    assert Kind.made == Kind.closed == 4 and Kind.most == 4 and not out.failed and not out.silent


def test_what_an_environment_spoils_is_played_again_and_then_left_out():
    class Kind(Watched):
        breaks = collections.Counter({1: 1, 2: 100})

    out = collected(Kind, parallel=2)
    assert [r.row for r in out.records] == [0, 0, 0, 1, 1, 1], "the one of seed 1 was played again"
    assert collections.Counter(e.seed for e in out.failed) == {1: 1, 2: 6}
    assert all("ConnectionError: gone" in e.reason for e in out.failed)


def test_episodes_are_graded_as_they_end():
    times = []

    async def grade(episode):
        times.append((episode.seed, len(episode.actions)))
        return verdict(episode)

    def policy(seed, member):
        async def slow(transcript, room):
            await asyncio.sleep(0.2 if seed == 1 and member == 0 else 0.0)
            return await scripted(lambda: Action("?"))(transcript, room)

        return slow

    limits = Limits(turns=2)
    gathered(Windows, policy, grade, [1, 2], size=2, parallel=4, limits=limits)
    assert len(times) == 4 and times[-1][0] == 1 and [seed for seed, _ in times].count(2) == 2
    silent = gathered(Windows, policy, grade, [1], size=2, limits=Limits(tokens=8))
    assert not silent.records and len(silent.silent) == 2 and len(times) == 4


def test_what_is_left_of_a_group_is_compared_when_it_is_there():
    class Kind(Watched):
        breaks = collections.Counter({1: 1, 2: 100})

    seen = []

    async def compare(episodes, grades):
        assert len({episode.seed for episode in episodes}) == 1 and len(episodes) == len(grades)
        seen.append([grade.reward for grade in grades])
        return [Grade(10.0 * grade.reward + n, False, {}) for n, grade in enumerate(grades)]

    out = collected(Kind, parallel=2, compare=compare)
    assert seen == [[1.0, 0.0, 0.0]] * 2, "of seed 2 nothing is left"
    assert [r.grade.reward for r in out.records] == [10.0, 1.0, 2.0] * 2


def test_a_grader_that_raises_ends_it_and_environments_are_closed():
    class Kind(Watched):
        made = closed = 0

    async def grade(episode):
        raise ZeroDivisionError

    policy = lambda seed, member: scripted(lambda: Action("?"))  # noqa: E731
    with pytest.raises(ExceptionGroup):
        gathered(Kind, policy, grade, [1], size=2, limits=Limits(turns=1))
    assert Kind.made == Kind.closed == 2


def test_records_become_metrics_and_rows():
    """Lengths and log-probabilities are of what was drawn; the environment's words are not the policy's."""
    records = collected(Watched, parallel=3).records
    numbers = metrics.by_source(records)
    assert numbers["accuracy/windows"] == pytest.approx(1 / 3) and numbers["pass@3/windows"] == 1.0
    drawn, all_ = (np.mean([len(part) for part in parts]) for parts in zip(*((r.said, r.answer) for r in records)))
    assert numbers["length/windows"] == drawn < all_
    rows, left_out = to_rows(
        records, np.ones(len(records)), rows=(4, 12), tokens=2048, patches=1024, channels=FORM.patcher.channels,
        image=FORM.tokenizer.image, names=["windows"], per="token",
    )  # fmt: skip
    assert not left_out and (rows["loss_weight"] > 0).sum() == sum(r.drawn.sum() for r in records)


def test_an_engine_draws_from_the_conversation_as_a_document():
    asked = []

    async def complete(document, room, turn):
        asked.append((document, room, turn))
        ids = FORM.tokenizer.encode("hm") + [FORM.tokenizer.eos]
        return SimpleNamespace(tokens=ids, logprobs=-np.arange(len(ids)), versions=[5] * len(ids))

    limits = Limits(turns=2, tokens=1500)
    out = gathered(Windows, lambda *_: served(complete), graded, [1], size=1, limits=limits)
    (record,) = out.records
    (first, room, turn), (second, less, turn_2) = asked
    np.testing.assert_array_equal(first.tokens, record.prompt)
    np.testing.assert_array_equal(
        second.tokens, [*record.prompt, *record.answer[: len(second.tokens) - len(first.tokens)]]
    )
    assert (turn, turn_2) == (0, 1) and room == 1500 - len(first.tokens) and less == 1500 - len(second.tokens)
    assert len(first.images) == 1 and (record.versions[record.drawn] == 5).all()
    np.testing.assert_array_equal(record.said, [*-np.arange(3.0), *-np.arange(3.0)][: len(record.said)])


def test_the_reward_system_grades_episodes_as_they_are():
    """By the environment's verdict, or by a rule from what was asked and answered, in its own processes."""
    table = {"sources": {
        "windows": {"parts": {"done": {"kind": "environment"}}},
        "desk/lookup": {"parts": {"price": {"kind": "rule", "rule": "number"}}},
    }}  # fmt: skip

    def solving(name, oracle):
        environments = {}

        def policy(seed, member):
            environments[member] = envs.make(name)
            environments[member].reset(seed)
            right = oracle(environments[member])
            return scripted(right if member == 0 else lambda: oracles.call("answer", text="-1"))

        return policy

    with RewardSystem(table) as system:
        for name, oracle in (("windows", oracles.of_windows), ("desk/lookup", oracles.of_lookup)):
            make = functools.partial(envs.make, name)
            out = gathered(make, solving(name, oracle), system.grade, [4, 5], size=2, limits=LIMITS)
            assert [r.grade.correct for r in out.records] == [True, False] * 2
            assert [r.grade.reward for r in out.records][::2] == [1.0, 1.0]
