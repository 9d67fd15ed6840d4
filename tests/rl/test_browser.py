"""MiniWoB++ in a real browser: three tasks won by clicks on coordinates, screenshots to the byte, browsers that die.

Not covered: the other tasks (benchmarks/gym.py plays more than forty of them).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import time

import numpy as np
import pytest

from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.rl import envs
from glmv_jax.rl.arena import Arena
from glmv_jax.rl.envs import browser, oracles
from glmv_jax.rl.play import Limits, play
from glmv_jax.rl.players import scripted
from glmv_jax.rl.transcript import Form
from glmv_jax.typing import UserError

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "a browser is here")

FORM = Form(Tokenizer(), Patcher(max_patches=64))


def played(environment, choose, seed=0):
    return asyncio.run(play(environment, scripted(choose), seed, FORM, Limits(turns=8, seconds=60)))


@pytest.fixture
def started():
    """Makes browsers and sees that none is left, whatever happened."""
    made = []

    def make(task: str) -> browser.Browser:
        made.append(envs.make(f"miniwob/{task}"))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.close()  # and it may be closed twice
    assert not browser._drivers()


@pytest.mark.parametrize("task", ["click-test", "click-button", "enter-text"])
def test_tasks_are_won_by_coordinates_and_begin_the_same(started, task):
    environment = started(task)
    rewards, first = [], []
    for seed in (0, 1, 0):
        episode = played(environment, oracles.of_browser(environment), seed)
        assert episode.ended == "done" and not episode.malformed, episode.reason
        rewards.append(episode.reward)
        patches, _ = episode.transcript.images[0]
        first.append(episode.transcript.hashes[0])
        assert len(patches) and len(episode.transcript.images) == len(episode.actions)
    assert rewards == [1.0, 1.0, 1.0] and first[0] == first[2] != first[1]
    one, other = (np.asarray(environment.reset(5).images[0]) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert one.shape == (210, 160, 3)


def test_tools_may_be_fewer():
    few = envs.make("miniwob/click-test", tools=("click", "wait"))
    assert [each["function"]["name"] for each in few.tools] == ["click", "wait"]
    with pytest.raises(UserError, match="a browser has no tool 'clik'; it has click, double_click"):
        envs.make("miniwob/click-test", tools=("clik",))


def test_keys_wheel_and_what_a_browser_refuses(started):
    environment = started("enter-text")
    win = oracles.of_browser(environment)
    odd = [oracles.call("scroll", x=500, y=500, direction="down"), oracles.call("click", x=5, y=4000),
           oracles.call("type", text="😀"), oracles.call("press", key="<Any>"), oracles.call("move", x=0, y=999),
           oracles.call("press", key="<Tab>"), oracles.call("wait")]  # fmt: skip
    plan = list(odd)
    episode = asyncio.run(play(environment, scripted(lambda: plan.pop(0) if plan else win()), 0, FORM,
                               Limits(turns=12, seconds=60)))  # fmt: skip
    assert episode.reward == 1.0 and not episode.malformed
    text = FORM.tokenizer.decode(episode.transcript.tokens, keep_special=True)
    for answer in ("4000 is not in 0..999", "of the basic plane", "there is no key '<Any>'"):
        assert text.count(answer) == 1, answer


def test_a_browser_is_kept_until_it_dies_and_the_next_begins_as_it_did(started):
    """A dead one is one failed episode and leaves nothing behind."""
    arena, made = Arena(lambda name: made.append(started(name)) or made[-1], 1), []

    def episode(choose, seed):
        policy = scripted(lambda: choose() if choose else oracles.of_browser(made[-1])())
        return asyncio.run(arena.play("click-test", policy, seed, FORM, Limits(turns=8, seconds=60)))

    def killed():
        (driver,) = browser._drivers()
        for pid, (_, parent) in browser._processes().items():
            if parent == driver:
                os.kill(pid, signal.SIGKILL)
        return oracles.of_browser(made[-1])()

    first = [episode(None, seed) for seed in (0, 1)]
    assert len(made) == 1
    dead = episode(killed, 2)
    assert dead.failed and "Exception" in dead.reason, dead
    assert not browser._drivers()
    again = [episode(None, seed) for seed in (1, 0)][::-1]
    assert [e.reward for e in first + again] == [1.0] * 4 and arena.made["click-test"] == len(made) == 2
    for kept, fresh in zip(first, again):
        assert kept.transcript.tokens.tolist() == fresh.transcript.tokens.tolist()
        assert kept.transcript.hashes == fresh.transcript.hashes and kept.transcript.images
    assert arena.gone["click-test"] == 1 and browser._drivers()
    arena.close()
    assert not browser._drivers()


def test_a_browser_that_is_closed_while_it_starts_is_ended(started):
    """As when time is over while it starts: the thread that starts it finds that nobody wants it any more."""
    environment = started("click-test")
    with concurrent.futures.ThreadPoolExecutor() as threads:
        late = threads.submit(environment.reset, 0)
        while environment._opening is None:
            time.sleep(0.001)
        environment.close()
        with pytest.raises(RuntimeError, match="closed while its browser started"):
            late.result()
    assert not browser._drivers()
    assert played(environment, oracles.of_browser(environment)).reward == 1.0
