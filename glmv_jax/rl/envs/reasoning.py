"""reasoning-gym's data sets as environments of one turn, graded by their own `score_answer` (Apache-2.0,
open-thought/reasoning-gym): about a hundred kinds of puzzles, all in words.

Some of these graders raise, some call `eval` on the answer or let sympy read it, so that `9**9**9` never ends and
`exit()` exits: they run in processes that are killed at a time limit (`rewards.pool`). That is no sandbox against an
attacker, who would find files and network.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

from glmv_jax.data.chat import parse_answer
from glmv_jax.rl.gym import Action, Observation, Step, asked
from glmv_jax.rl.rewards.grade import extract_box
from glmv_jax.rl.rewards.pool import Pool, RuleError
from glmv_jax.rl.rewards.worker import Spec
from glmv_jax.typing import UserError

# Questions that come without an answer to be had from it (`answer` is None), or need others to be made of.
UNANSWERED = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
COMPOSED = ("composite",)
ASKS = "Put the answer alone, and nothing else, into an answer box."


_SPEC = Spec.of("glmv_jax.rl.envs.reasoning:grader")
_MEMORY = 2 << 30  # bytes of data


@functools.cache
def pool() -> Pool:
    """The process in which all environments grade."""
    return Pool([_SPEC], workers=1, memory=_MEMORY)


def grader() -> Callable[..., float]:
    """What that process runs: the score of an answer to an entry of a data set."""
    package = _package()

    def score(name: str, config: dict[str, Any], entry: dict[str, Any], answer: str) -> float:
        value = float(package.create_dataset(name, **config).score_answer(answer, entry))
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"the score {value} is outside [0, 1]")
        return value

    return score


def names() -> list[str]:
    """The data sets whose own answers can be graded."""
    _package()
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {*UNANSWERED, *COMPOSED})


class Reasoning:
    """name: of the data set.   config: of it, where its own defaults are not wanted; JSON-able.   limit: seconds that a
    grader may take.

    entry: the question of the episode as reasoning-gym has it, with its answer, for a script.
    """

    def __init__(self, name: str, limit: float = 5.0, **config: Any):
        package = _package()
        self.source = f"reasoning_gym/{name}"
        self.name, self.config = name, config
        self._limit = limit
        try:
            package.create_dataset(name, seed=0, size=1, **config)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"reasoning_gym has no data set {name!r} of {config}: {error}") from None

    def reset(self, seed: int) -> Observation:
        self._seeded = self.config | {"seed": seed, "size": 1}
        with _seeded_random(seed):
            self.entry = _package().create_dataset(self.name, **self._seeded)[0]
        return asked(f"{self.entry['question']}\n\n{ASKS}")

    async def step(self, action: Action) -> Step:
        """The score is that of the one box's content; without one, or with several, 0. info["error"]: why a grader
        that raised, hung or died gave none."""
        content, flag = extract_box(action.text)
        if flag == "long_box":  # no limit here: answers may be whole boards
            content, flag = parse_answer(action.text), ""
        if flag:
            return Step(Observation(), True, 0.0, {"flag": flag})
        question = self.name, self._seeded, self.entry, content
        try:
            reward = await asyncio.wrap_future(pool().submit(_SPEC, *question, limit=self._limit))
        except (RuleError, TimeoutError) as error:
            return Step(Observation(), True, 0.0, {"error": f"{type(error).__name__}: {error}"})
        return Step(Observation(), True, reward)

    def close(self) -> None:
        """The process that grades belongs to all."""


_RANDOM = threading.Lock()


@contextlib.contextmanager
def _seeded_random(seed: int) -> Iterator[None]:
    """The generator that all of Python shares, seeded for the while: `list_functions` draws from it too."""
    with _RANDOM:
        before = random.getstate()
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise UserError('reasoning-gym is not installed; run pip install "glmv_jax[rl]"') from None
    return reasoning_gym
