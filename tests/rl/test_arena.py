"""Environments that are kept: one is reset for the next episode and begins as a fresh one would, to the byte; how many
there are at a time, whose place another takes, and what is never played in again.

A browser that is kept: `test_browser`.
"""

from __future__ import annotations

import asyncio

import pytest

from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.rl import envs
from glmv_jax.rl.arena import Arena
from glmv_jax.rl.envs import oracles
from glmv_jax.rl.envs.windows import Windows
from glmv_jax.rl.gym import Action
from glmv_jax.rl.play import Limits, Stopped
from glmv_jax.rl.players import scripted
from glmv_jax.rl.transcript import Form

FORM = Form(Tokenizer(), Patcher(max_patches=64))
LIMITS = Limits(turns=3, tokens=6000)
SAYS = scripted(lambda: Action("hm"))


class Watched(Windows):
    """Windows that remember what was done to them."""

    def __init__(self, at_work: list):
        super().__init__()
        self.at_work, self.seeds, self.closed = at_work, [], 0

    def reset(self, seed):
        self.seeds.append(seed)
        return super().reset(seed)

    async def step(self, action):
        self.at_work.append(self)
        most = len(self.at_work)
        await asyncio.sleep(0.001)
        self.at_work.remove(self)
        assert most <= 2
        if action.text == "break":
            raise ConnectionError("gone")
        if action.text == "sleep":
            await asyncio.sleep(60)
        return await super().step(action)

    def close(self):
        self.closed += 1


@pytest.fixture
def made():
    return {}


@pytest.fixture
def arena(made):
    at_work = []

    def make(name):
        made.setdefault(name, []).append(Watched(at_work))
        return made[name][-1]

    return Arena(make, 2)


async def several(arena, *named, policy=SAYS, limits=LIMITS):
    return await asyncio.gather(*(arena.play(name, policy, seed, FORM, limits) for name, seed in named))


def test_no_more_than_may_be_are_there_and_they_are_kept_from_step_to_step(arena, made):
    for first in (0, 10):  # event loops of their own, as the steps of a run have
        asyncio.run(several(arena, *(("a", seed) for seed in range(first, first + 5))))
    assert arena.made == {"a": 2} and not arena.gone and not any(each.closed for each in made["a"])
    assert sorted(seed for each in made["a"] for seed in each.seeds) == [*range(5), *range(10, 15)]
    asyncio.run(several(arena, ("b", 0)))
    assert arena.made == {"a": 2, "b": 1} and sorted(each.closed for each in made["a"]) == [0, 1], "one made room"
    asyncio.run(several(arena, ("a", 20), ("b", 20)))
    assert arena.made == {"a": 2, "b": 1} and not arena.gone
    arena.close()
    assert [each.closed for each in made["a"] + made["b"]] == [1, 1, 1]


def test_what_failed_or_hangs_is_closed_and_another_is_made(arena, made):
    for word, ended, limits in (("break", "failed", LIMITS), ("sleep", "time", Limits(seconds=0.1))):
        policy = scripted(lambda word=word: Action(word))
        (episode,) = asyncio.run(several(arena, ("a", 1), policy=policy, limits=limits))
        assert episode.ended == ended and made["a"][-1].closed
    (episode,) = asyncio.run(several(arena, ("a", 1)))
    assert episode.ended == "turns" and arena.made == {"a": 3} and arena.gone == {"a": 2}

    async def cancelled():
        task = asyncio.create_task(arena.play("a", scripted(lambda: Action("sleep")), 1, FORM))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    assert arena.gone == {"a": 3} and made["a"][2].closed, "it may still be at work in a thread"
    arena.close()


def test_a_policy_that_leaves_and_an_episode_that_nobody_wants_leave_the_environment(arena, made):
    async def leaves(transcript, room):
        raise Stopped

    async def bug(transcript, room):
        raise ZeroDivisionError

    async def both():
        with pytest.raises(Stopped):
            await arena.play("a", leaves, 1, FORM, LIMITS)
        with pytest.raises(Stopped):
            await arena.play("a", SAYS, 2, FORM, LIMITS, wanted=lambda: False)
        await arena.play("a", SAYS, 3, FORM, LIMITS)
        with pytest.raises(ZeroDivisionError):
            await arena.play("a", bug, 4, FORM, LIMITS)

    asyncio.run(both())
    assert arena.made == arena.gone == {"a": 1} and made["a"][0].seeds == [1, 3, 4]


@pytest.mark.parametrize("name", ["windows", "gymnasium/CartPole-v1", "desk/count"])
def test_one_that_was_played_in_begins_as_a_fresh_one(name):
    arena, played = Arena(envs.make, 1), {}
    acts = scripted(lambda: oracles.call("act", action=0))
    for seed in (3, 4, 3):
        episode = asyncio.run(arena.play(name, acts, seed, FORM, LIMITS))
        kept = episode.transcript
        fresh = asyncio.run(Arena(envs.make, 1).play(name, acts, seed, FORM, LIMITS)).transcript
        assert kept.tokens.tolist() == fresh.tokens.tolist() and kept.hashes == fresh.hashes and kept.turns == 3
        played.setdefault(seed, kept.tokens.tolist())
        (waits,) = arena._waiting
        seen, other = waits[1].reset(seed), envs.make(name).reset(seed)
        assert (seen.messages, seen.tools) == (other.messages, other.tools)
        assert [image.tobytes() for image in seen.images] == [image.tobytes() for image in other.images]
    assert arena.made == {name: 1} and played[3] != played[4]
    arena.close()
