"""One loop for all environments: scripts that know the answer win in each of them; limits, crashes and bad calls.

Not covered here: a browser (`test_browser`), and all data sets of reasoning-gym (benchmarks/gym.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time

import gymnasium
import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import chat
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.rl import envs, rewards, tasks
from glmv_jax.rl.envs import desk, oracles, search
from glmv_jax.rl.envs.classic import Classic
from glmv_jax.rl.gym import Action, Observation, Step, asked, said_by
from glmv_jax.rl.play import Limits, play
from glmv_jax.rl.players import scripted
from glmv_jax.rl.transcript import Form, Turn
from glmv_jax.typing import UserError

FORM = Form(Tokenizer(), Patcher(max_patches=64))
LIMITS = Limits(turns=12, tokens=6000, seconds=60)


def played(environment, choose, seed=0, limits=LIMITS):
    return asyncio.run(play(environment, scripted(choose), seed, FORM, limits))


class Light(gymnasium.Env):
    """A picture that is red or green, answered in words: an environment of other spaces than the toy ones."""

    observation_space = gymnasium.spaces.Dict(
        {"light": gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8), "turn": gymnasium.spaces.Discrete(9)}
    )
    action_space = gymnasium.spaces.Text(min_length=2, max_length=4, charset="stopg")

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return self._seen(), {}

    def step(self, action):
        right = action == ("stop" if self.red else "go")
        self.turn += 1
        return self._seen(), 0.5 * right, self.turn == 2, False, {}

    def _seen(self):
        self.red = bool(self.np_random.integers(2))
        colour = (255, 0, 0) if self.red else (0, 255, 0)
        return {"light": np.full((16, 16, 3), colour, np.uint8), "turn": np.int64(self.turn)}


def light():
    return Classic(Light, "light", "Say stop at red and go at green.")


def at_light(env):
    return lambda: oracles.call("act", action="stop" if env._env.red else "go")


def frozen():
    moves = ("left", "down", "right", "up")
    return envs.make("gymnasium/FrozenLake-v1", instructions="Reach the goal.", actions=moves, is_slippery=False)


def over_ice(env):
    path = [2, 2, 1, 1, 1, 2]  # the map of FrozenLake-v1 is SFFF FHFH FFFH HFFG
    return oracles.one_after_another(lambda: [oracles.call("act", action=env._names[n]) for n in path])


PUZZLES = ("leg_counting", "basic_arithmetic", "mini_sudoku", "word_ladder", "spiral_matrix", "countdown")
WON = {f"reasoning_gym/{name}": (None, oracles.of_reasoning) for name in PUZZLES}
WON |= {f"task/{name}": (None, oracles.of_single) for name in ("count", "ground", "read")}
WON |= {
    "desk/lookup": (None, oracles.of_lookup),
    "desk/count": (None, oracles.of_single),
    "windows": (None, oracles.of_windows),
    "light": (light, at_light),
    "frozen": (frozen, over_ice),
}


@pytest.mark.parametrize("name", WON)
def test_a_script_that_knows_wins_and_the_beginning_is_the_seeds(name):
    """The loop has no case for any of them; where the environment has no verdict, the reward system gives it."""
    make, oracle = WON[name]
    make = make or (lambda: envs.make(name))
    verifiers = tasks.verifiers() | {"lookup": desk.lookup_verifier()}
    first = []
    for seed in (0, 1, 2):
        environment, again = make(), make()
        episode = played(environment, oracle(environment), seed)
        assert (episode.ended, episode.malformed, episode.reason) == ("done", 0, "") and not episode.failed
        assert episode.source == environment.source and episode.seed == seed
        reward = episode.reward
        if reward is None:
            (grade,) = rewards.score([episode.sample], [episode.text], verifiers)
            reward = grade.reward
        assert reward == 1.0
        seen, same = environment.reset(seed), again.reset(seed)
        assert seen.messages == same.messages and seen.tools == same.tools
        assert [image.tobytes() for image in seen.images] == [image.tobytes() for image in same.images]
        first.append((str(seen.messages), [image.tobytes() for image in seen.images]))
        environment.close(), again.close()
    if name != "frozen":  # which always begins in its corner
        assert len({str(each) for each in first}) > 1


@pytest.mark.parametrize("name, wrong", [
    ("reasoning_gym/leg_counting", Action(chat.boxed("0"))),
    ("reasoning_gym/leg_counting", Action("without a box")),
    ("reasoning_gym/prime_factorization", Action(chat.boxed("zzz"))),  # its grader raises ValueError
    ("windows", oracles.call("click", x=999, y=999)),
    ("windows", Action("I wonder.")),
])  # fmt: skip
def test_what_is_wrong_gets_nothing(name, wrong):
    episode = played(envs.make(name), lambda: wrong)
    assert episode.reward == 0.0 and not episode.failed, "a verdict of its own, also where a limit ended it"
    assert ("ValueError" in episode.info.get("error", "")) == (name == "reasoning_gym/prime_factorization")


def test_a_press_before_the_rest_is_done_is_a_failure():
    environment = envs.make("windows")
    episode = played(environment, lambda: oracles.call("click", **environment.solution[-1]["arguments"]))
    assert (episode.ended, episode.reward, len(episode.actions)) == ("done", 0.0, 1)


def test_a_grader_that_runs_what_the_answer_says_harms_nobody():
    """`spiral_matrix` calls eval on an answer in brackets: one that exits, one that never ends, then a good one."""
    environment = envs.make("reasoning_gym/spiral_matrix", limit=1.0)
    for answer, error in (("[exit()]", "SystemExit"), ("[__import__('time').sleep(1e6)]", "TimeoutError")):
        episode = played(environment, lambda answer=answer: Action(chat.boxed(answer)))
        assert episode.reward == 0.0 and error in episode.info["error"]
    patient = envs.make("reasoning_gym/spiral_matrix", limit=60.0)
    assert played(patient, oracles.of_reasoning(patient)).reward == 1.0


def test_bad_calls_are_answered_counted_and_survived():
    environment = envs.make("windows")
    win = oracles.of_windows(environment)
    bad = [Action("I wonder."), oracles.call("jump"), oracles.call("click", x=5), oracles.call("click", x=5, y=-1),
           oracles.call("type", text="a\nb")]  # fmt: skip
    said = [*bad]
    episode = played(environment, lambda: said.pop(0) if said else win())
    assert episode.reward == 1.0 and episode.malformed == 2  # the others are well formed, and refused
    text = FORM.tokenizer.decode(episode.transcript.tokens, keep_special=True)
    for answer in ("<|user|>Nothing was done. Call a tool: click, type.", "there is no tool 'jump'", "click needs y",
                   "the coordinate -1 is not in 0..999", "letters of one line"):  # fmt: skip
        assert text.count(answer) == 1, answer


def test_a_turn_of_several_calls_is_answered_one_by_one():
    environment = envs.make("desk/lookup")
    calls = (*oracles.call("crop", x1=0, y1=0, x2=500, y2=500).tool_calls,
             *oracles.call("search", query="zzz").tool_calls)  # fmt: skip
    plan = [Action(tool_calls=calls), Action("17")]
    episode = played(environment, lambda: plan.pop(0))
    text = FORM.tokenizer.decode(episode.transcript.tokens, keep_special=True)
    assert text.count("<|observation|>") == 1 and "picture 2</tool_response><tool_response>nothing was found" in text
    assert len(episode.transcript.images) == 2 and episode.text == "17" and episode.ended == "done"
    assert episode.reward is None and episode.sample.source == "lookup", "that is for the reward system"


def test_a_crop_is_the_part_enlarged():
    environment = envs.make("desk/lookup")
    environment.reset(0)
    whole, (x1, y1, x2, y2) = environment.pictures[0], environment.sample.meta["box"]
    (part,) = environment.call("crop", {"x1": x1, "y1": y1, "x2": x2, "y2": y2}).images
    left, top, right, bottom = round(x1 * 0.192), round(y1 * 0.144), round(x2 * 0.192), round(y2 * 0.144)
    scale = min(192 / (right - left), 144 / (bottom - top), 8)
    assert part.size == (round(scale * (right - left)), round(scale * (bottom - top)))
    expected = whole.crop((left, top, right, bottom)).resize(part.size, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(part), np.asarray(expected))
    assert np.asarray(part).std() > 20, "letters are in it"
    for box in ({"x1": 9, "x2": 3}, {"x1": 0, "x2": 5}, {"picture": 4}, {"x2": 3000}):
        reply = asyncio.run(environment.step(oracles.call("crop", **({"x1": 0, "y1": 0, "x2": 999, "y2": 999} | box))))
        assert "Not done" in reply.observation.messages[0]["content"][0]["text"] and not reply.observation.images


def test_search_ranks_as_bm25_says():
    """By hand: idf of a word in one of three texts is log(1 + 2.5 / 1.5), in two log(1 + 1.5 / 2.5)."""
    index = search.Index(["red cat", "a cat sat on a mat", "天空是蓝色"])
    assert index("CAT mat?") == ["a cat sat on a mat", "red cat"] and index("色") == ["天空是蓝色"] and index("x") == []
    mean = (2 + 6 + 5) / 3
    term = lambda idf, length: idf * 2.2 / (1 + 1.2 * (0.25 + 0.75 * length / mean))  # noqa: E731
    assert index.score("cat", 0) == pytest.approx(term(np.log(1.6), 2))
    assert index.score("cat mat", 1) == pytest.approx(term(np.log(1.6), 6) + term(np.log(1 + 2.5 / 1.5), 6))


# --- limits and failures ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Faulty:
    """Goes on for ever and does one thing wrong, in its second step."""

    fault: str = ""
    source: str = "faulty"
    steps: int = 0
    closed: int = 0

    def reset(self, seed):
        self.steps = 0
        if self.fault == "reset":
            raise RuntimeError("no\nscreen")
        if self.fault == "mend":
            raise UserError("chromium is missing; install it")
        return asked("go")

    async def step(self, action):
        self.steps += 1
        if self.steps == 2:
            if self.fault == "raises":
                raise ConnectionError("the browser died")
            if self.fault == "hangs":
                await asyncio.to_thread(time.sleep, 0.5)
            if self.fault == "nan":
                return Step(Observation(), False, float("nan"))
            if self.fault == "picture":
                return Step(Observation((said_by("user", "see", [None]),)), False)
        return Step(Observation((said_by("user", "more"),)), False, 0.25)

    def close(self):
        self.closed += 1
        if self.fault == "raises":
            raise OSError("and does not close")


@pytest.mark.parametrize("fault, reason", [
    ("reset", "RuntimeError: no screen"), ("raises", "ConnectionError: the browser died"),
    ("nan", "its reward is nan"), ("picture", "its observation is none: ValueError"),
])  # fmt: skip
def test_what_an_environment_does_wrong_is_data(fault, reason, caplog):
    environment = Faulty(fault)
    episode = played(environment, lambda: Action("ok"))
    assert episode.failed and reason in episode.reason and environment.closed == 1
    assert f"episode 0 of faulty failed in turn {len(episode.actions)}: {reason}" in caplog.text
    assert episode.transcript.turns == {"reset": 0}.get(fault, 2)


def test_what_the_person_must_mend_is_raised_and_so_is_a_policy_that_is_broken():
    with pytest.raises(UserError, match="chromium is missing"):
        played(Faulty("mend"), lambda: Action("ok"))
    with pytest.raises(ZeroDivisionError):
        played(Faulty(), lambda: 1 / 0)


def test_limits_end_an_episode():
    turns = played(Faulty(), lambda: Action("ok"), limits=Limits(turns=3))
    assert (turns.ended, len(turns.actions), turns.reward) == ("turns", 3, 0.75)
    short = played(Faulty(), lambda: Action("ok " * 50), limits=Limits(tokens=40))
    assert short.ended == "tokens" and len(short.transcript) == 40, "the turn was cut to what there was room for"
    late = Faulty("hangs")
    assert played(late, lambda: Action("ok"), limits=Limits(seconds=0.2)).ended == "time" and late.closed == 1

    async def slow(transcript, room):
        await asyncio.sleep(60)
        return Turn.of([1])

    assert asyncio.run(play(Faulty(), slow, 0, FORM, Limits(seconds=0.1))).ended == "time"
    seen = dataclasses.replace(LIMITS, patches=1)
    shown = played(envs.make("windows"), lambda: Action("ok"), limits=seen)
    assert shown.ended == "tokens" and not shown.actions and not shown.transcript.images


def test_many_play_at_once():
    """As rollouts do: each has its own environment, and none waits for another."""

    def one(seed):
        environment = envs.make("windows")
        return play(environment, scripted(oracles.of_windows(environment)), seed, FORM, LIMITS)

    async def all_():
        return await asyncio.gather(*(one(seed) for seed in range(8)))

    assert [episode.reward for episode in asyncio.run(all_())] == [1.0] * 8


@pytest.mark.parametrize("name, message", [
    ("bowser/click-test", "of no family"), ("task/cuont", "nearest: count"), ("reasoning_gym/legs", "no data set"),
    ("miniwob/click-tset", "no task"), ("gymnasium/Frozen-v9", "cannot make"), ("gymnasium/CartPole-v2", "cannot make"),
])  # fmt: skip
def test_environments_that_are_not_there_are_named(name, message):
    with pytest.raises(UserError, match=message):
        envs.make(name)


def test_actions_without_a_description_are_refused():
    class Steering(Light):
        action_space = gymnasium.spaces.Box(-1, 1, (2,))

    with pytest.raises(UserError, match="have no description"):
        Classic(Steering, "steering")


def test_a_question_is_its_seeds_also_where_a_data_set_draws_from_what_all_share():
    """`list_functions` of reasoning-gym draws some of its numbers with `random.randint`."""
    environment = envs.make("reasoning_gym/list_functions")
    random.seed(1)
    one = [environment.reset(seed) for seed in range(40)]
    random.seed(2)
    assert [environment.reset(seed) for seed in range(40)] == one
    drawn = random.random()
    random.seed(2)
    assert random.random() == drawn, "and leaves no trace there"
