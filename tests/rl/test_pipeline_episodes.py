"""Episodes in the pipeline: stopped and gone on with, failing, changing their mind, and over a restart.

What draws is a function of the place in the conversation, a token a tick, so that an episode that was stopped and gone
on with has to be the one that was not. Not covered here: the inference engine (tests/train/test_rl_episodes.py).
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import json
import threading
import types
from concurrent.futures import Future

import numpy as np
import pytest
from PIL import Image

from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.front import Ticket
from glmv_jax.rl.arena import Arena
from glmv_jax.rl.episodes import verdict
from glmv_jax.rl.gym import Observation, Step, asked, said_by
from glmv_jax.rl.pipeline import Group, Request, Scheduler, Settings
from glmv_jax.rl.pipeline.background import Background, Parts
from glmv_jax.rl.pipeline.episodes import EpisodeEngine, Mixture, is_episode, records
from glmv_jax.rl.play import Limits
from glmv_jax.rl.transcript import Form
from tests.rl.simulated import Numbers

TOKENIZER = Tokenizer()
FORM = Form(TOKENIZER, Patcher(max_patches=16))
LIMITS = Limits(turns=4, tokens=400, patches=64)
GROUP, LONGEST = 2, 9


class Talk:
    """Up to four turns; what is said and shown depends on what was drawn, the end too."""

    source = "talk"

    def __init__(self, world):
        self.world = world

    def reset(self, seed):
        self.seed, self.turns = seed, 0
        self.world.resets += 1
        return asked(f"Begin {seed}.", [self._picture(str(seed))])

    async def step(self, action):
        self.turns += 1
        await asyncio.sleep(self.world.patience.get(self.seed, 0.0))
        if self.seed in self.world.breaks:
            raise ConnectionError("gone")
        said = f"{action.text[:3]} {self.world.mood}"
        images = [self._picture(said)] * (self.turns == 2)
        done = self.turns == 2 + self.seed % 3
        return Step(Observation((said_by("user", said, images),), tuple(images)), done, self.turns / 8)

    def _picture(self, said):
        return Image.fromarray(np.random.default_rng(list(said.encode())).integers(0, 256, (24, 24, 3), np.uint8))

    def close(self):
        self.world.closed += 1


class Writing(Ticket):
    """Of what draws here."""

    def __init__(self, done, stop, task):
        self.done, self.stop, self.task = done, stop, task

    def abort(self):
        self.stop.set()


class World:
    """What draws, a token a tick, with the weights there are; and the arena.

    hangs: the turn from which a token takes a minute. patience: by seed, seconds an answer of the environment takes.
    breaks: seeds that fail. mood: of all it says.
    """

    def __init__(self, tick=0.0, size=8):
        self.tick, self.patience, self.breaks, self.mood, self.closed = tick, {}, set(), "", 0
        self.hangs, self.tickets = 99, []
        self.version, self.resets, self.drawn = 0, 0, collections.Counter()
        self.arena = Arena(lambda name: Talk(self), size)
        self.engine = EpisodeEngine(self.arena, self.ask, FORM, LIMITS, LONGEST)

    def ask(self, request, document, room, turn, begun):
        """Lengths and tokens depend on the conversation before the turn."""
        before = np.asarray(document.tokens).tolist()
        rng = np.random.default_rng([request.prompt.uid, request.member, len(before), before[-4]])
        length = int(rng.integers(2, LONGEST + 1))
        words = rng.integers(len(TOKENIZER.special), TOKENIZER.vocab_size, LONGEST).tolist()
        ids = (words[: length - 1] + [TOKENIZER.special["<|user|>"]])[: min(room, LONGEST)]
        known = [] if begun is None else [(*x,) for x in zip(begun.tokens, begun.logprobs, begun.versions)]
        assert [int(x[0]) for x in known] == ids[: len(known)] and len(known) < len(ids)
        return self._ticket(request, known, ids, self.tick if turn < self.hangs else 60.0)

    def _ticket(self, request, known, ids, tick):
        done, stop = Future(), threading.Event()
        done.set_running_or_notify_cancel()

        async def write():
            while len(known) < len(ids) and not stop.is_set():
                await asyncio.sleep(tick)
                known.append((ids[len(known)], -len(known) / 8, self.version))
                self.drawn[request.prompt.uid] += 1
            tokens, logprobs, versions = (np.array(x) for x in (zip(*known) if known else ((), (), ())))
            reason = "aborted" if len(known) < len(ids) else "stop"
            done.set_result(types.SimpleNamespace(tokens=tokens, logprobs=logprobs, versions=versions, reason=reason))

        task = asyncio.get_running_loop().create_task(write())
        self.tickets.append(Writing(done, stop, task))
        return self.tickets[-1]

    def set_params(self, params, version):
        self.version = version

    def submit(self, request, on_done):
        self.engine.submit(request, on_done)

    def abort(self, id):
        self.engine.abort(id)

    def close(self):
        self.engine.close()


def mixture():
    return Mixture(None, 0, 2, lambda n: ("talk", "talk", n))


async def grade(request, completion):
    return verdict(completion.episode)


async def build(step, groups):
    return records(groups)


def answer(world, prompt, member=0, prefix=None):
    """To a request that is left alone."""

    async def one():
        done = asyncio.get_running_loop().create_future()
        world.submit(Request(0, prompt, member, prefix=prefix), done.set_result)
        return await done

    return asyncio.run(one())


def alone(prompt):
    """What is drawn when nothing is stopped: (tokens, hashes of the images) of each member."""
    answers = [answer(World(), prompt, member) for member in range(GROUP)]
    return [(x.drawn.tokens.tolist(), ",".join(x.episode.transcript.hashes)) for x in answers]


class Run:
    """A pipeline in a thread, as stage 5 has it, and all that was noted."""

    def __init__(self, world, settings, state=None):
        self.rows = []
        self.scheduler = lambda note: Scheduler(mixture(), settings, note)
        self.data = Background(Parts(self.scheduler, world, grade, build))
        self.data.set_state(state)

    def steps(self, *versions):
        taken = []
        for version in versions:
            got, rows = self.data.exchange(None, version)
            taken.append(got)
            self.rows += rows
        return taken

    def events(self, kind):
        return [row for row in self.rows if row["kind"] == kind]


def test_what_is_stopped_goes_on_where_it_was():
    """In the middle of a turn, and while an environment is at work that nobody waits for; to the token, the pixel and
    the version."""
    world = World(tick=0.004)
    world.patience = {1: 0.3}
    run = Run(world, Settings(2, GROUP, staleness=99, late="abort", in_flight=4, seconds=0.05))
    try:
        taken = run.steps(*range(8))
        assert not world.arena.gone and world.arena.made["talk"] <= 8, "none was at fault"
    finally:
        run.data.close()
    groups = [group for one in taken for group in one.groups]
    assert len({group.prompt.uid for group in groups}) == len(groups)
    gone_on = spans = 0
    for one in taken:
        for n, group in enumerate(one.groups):
            wanted = alone(group.prompt)
            for i, member in enumerate(group.members):
                record = [x for x in one.batch if x.row == n][i]
                assert (record.answer.tolist(), record.image_hash) == wanted[i]
                drawn = member.answer.drawn
                assert drawn.tokens.tolist() == record.answer.tolist() and (drawn.versions >= 0).tolist() == list(
                    record.drawn
                )
                versions = drawn.versions[drawn.versions >= 0]
                assert (np.diff(versions) >= 0).all() and 0 <= one.step - versions[0]
                np.testing.assert_array_equal(record.versions, drawn.versions)
                gone_on += member.aborts > 0
                spans += versions[0] < versions[-1]
                assert not member.answer.facts["thrown_away"]
    total = sum(int((m.answer.drawn.versions >= 0).sum()) for group in groups for m in group.members)
    trained = {group.prompt.uid for group in groups}
    assert sum(n for uid, n in world.drawn.items() if uid in trained) == total, "no token was drawn twice"
    assert gone_on > 3 and spans > 1 and len(run.events("aborted")) >= gone_on


def test_an_environment_that_says_something_else_has_what_was_drawn_thrown_away():
    world = World()
    prompt = mixture().draw()
    whole = answer(world, prompt)
    world.mood = "sour"
    again = answer(world, prompt, prefix=whole.drawn)
    assert again.facts["thrown_away"] == (whole.drawn.versions >= 0).sum() > 0 and again.reason == "stop"
    assert again.drawn.tokens.tolist() != whole.drawn.tokens.tolist()
    assert answer(world, prompt).drawn.tokens.tolist() == again.drawn.tokens.tolist()
    kept = answer(world, prompt, prefix=again.drawn)
    assert kept.drawn.tokens.tolist() == again.drawn.tokens.tolist() and not kept.facts["thrown_away"]
    assert world.arena.made["talk"] == 1, "it did nothing wrong"


def test_what_is_stopped_is_answered_at_once_whatever_its_environment_does():
    """Also one that has no environment yet; that one never gets any."""
    world = World(size=1)
    world.patience = {0: 0.2}
    prompt, said = mixture().draw(), {}

    async def both():
        for id in (0, 1):
            world.submit(Request(id, prompt, id), functools.partial(said.__setitem__, id))
        while not world.engine._playing[0]._said():
            await asyncio.sleep(0.001)
        for id in (0, 1):
            world.abort(id)
            assert said[id].reason == "aborted"
        assert world.arena.made["talk"] == 1
        await asyncio.gather(*world.engine._tasks)

    asyncio.run(both())
    whole = answer(World(), prompt).drawn
    begun = said[0].drawn
    assert 0 < len(begun) < len(whole) and not len(said[1].drawn)
    np.testing.assert_array_equal(begun.tokens, whole.tokens[: len(begun)])
    assert begun.tokens[-1] in TOKENIZER.stops, "a whole turn"
    assert world.resets == 1 and not world.arena.gone
    gone_on = answer(world, prompt, prefix=begun)
    assert gone_on.drawn.tokens.tolist() == whole.tokens.tolist() and not gone_on.facts["thrown_away"]


def test_time_that_is_up_stops_what_draws():
    """And is an end as others are: what was said in whole turns is graded."""
    world, prompt = World(), mixture().draw()
    world.hangs, world.engine.limits = 1, dataclasses.replace(LIMITS, seconds=1.0)
    ended = answer(world, prompt)
    assert (ended.facts["ended"], ended.facts["turns"], ended.reason) == ("time", 1, "stop")
    assert ended.drawn.tokens.tolist() == answer(World(), prompt).drawn.tokens[: len(ended.drawn)].tolist()
    assert [ticket.stop.is_set() for ticket in world.tickets] == [False, True]


def test_an_environment_that_fails_costs_its_group_and_another_is_played():
    world = World()
    world.breaks = {1, 3}
    run = Run(world, Settings(2, GROUP, staleness=0))
    try:
        taken = run.steps(0, 1, 2)
    finally:
        run.data.close()
    uids = [group.prompt.uid for one in taken for group in one.groups]
    assert uids == [0, 2, 4, 5, 6, 7]
    assert collections.Counter(row["uid"] for row in run.events("given_up")) == {1: 1, 3: 1}
    failed = run.events("failed")
    assert {row["uid"] for row in failed} == {1, 3} and all("ConnectionError: gone" in row["error"] for row in failed)
    assert len(failed) >= 2 * 3 and world.arena.gone["talk"] >= len(failed)


def test_over_a_restart_nothing_is_drawn_again():
    """Complete episodes that wait are played by their tokens, and are of the weights that drew them."""
    settings = Settings(2, GROUP, staleness=2, in_flight=6)
    first = Run(World(), settings)
    try:
        (trained,) = first.steps(0)
        wait_until(lambda: len(first.data._pipeline.scheduler.ready) + len(first.data._pipeline.scheduler.picked) > 1)
        saved = json.loads(json.dumps(first.data.get_state()))
    finally:
        first.data.close()
    assert "patches" not in json.dumps(saved)
    have = {
        group["prompt"]["uid"]
        for group in saved["scheduler"]["groups"]
        if all(member["prefix"] is not None for member in group["members"])
    }
    world = World()
    second = Run(world, settings, saved)
    try:
        taken = second.steps(1, 2)
    finally:
        second.data.close()
    groups = [group for one in taken for group in one.groups]
    uids = [group.prompt.uid for group in groups]
    assert len({*uids, *(group.prompt.uid for group in trained.groups)}) == 6 and len(have.intersection(uids)) >= 2
    for one in taken:
        for n, group in enumerate(one.groups):
            shown = [(r.answer.tolist(), r.image_hash) for r in one.batch if r.row == n]
            assert shown == alone(group.prompt)
            if group.prompt.uid in have:
                assert not world.drawn[group.prompt.uid]
                assert all((m.answer.drawn.versions <= 0).all() for m in group.members)


def wait_until(what, seconds=10.0):
    for _ in range(int(seconds / 0.01)):
        if what():
            return
        threading.Event().wait(0.01)
    pytest.fail("it does not come")


class Learning(Numbers):
    """Questions of three sources, which are told what was trained on."""

    def learn(self, groups):
        self.learnt = [group.prompt.key for group in groups]


def test_questions_and_episodes_come_in_turn():
    rows = Learning(("q0", "q1", "q2"))
    mixed = Mixture(rows, 2, 1, lambda n: ("e", f"e{n}", 10 + n))
    prompts = [mixed.draw() for _ in range(6)]
    assert [(p.uid, p.source) for p in prompts] == [*enumerate(["q0", "q1", "e0", "q2", "q0", "e1"])]
    assert [is_episode(p) for p in prompts] == [False, False, True] * 2
    assert [p.key for p in prompts[1:3]] == [1, {"environment": "e", "seed": 10}]
    state, following = mixed.get_state(), mixed.draw()
    assert following.key == 4
    mixed.set_state(json.loads(json.dumps(state)))
    assert mixed.draw() == following
    mixed.learn([Group.fresh(prompt, 1) for prompt in prompts])
    assert rows.learnt == [0, 1, 2, 3]
