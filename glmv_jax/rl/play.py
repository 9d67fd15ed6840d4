"""One episode, from the first observation to its record: the same lines for every environment and every policy.

What an environment does wrong is data. The episode ends as "failed" with the reason, is logged, and whoever collects
episodes drops it or counts it; the environment is closed, so that its next `reset` begins with a fresh one. What a
policy does wrong is a bug and raises, but for what a model says: a malformed call is answered with its error by the
environment and counted here. A policy that will say no more raises Stopped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from glmv_jax.data.records import Sample
from glmv_jax.rl.gym import Action, Environment, Step
from glmv_jax.rl.transcript import Form, Transcript, Turn
from glmv_jax.typing import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

# (the conversation so far, whose last tokens open the model's turn; how many tokens there is room for) -> its turn
Policy = Callable[[Transcript, int], Awaitable[Turn]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of an episode. turns: of the model. tokens, patches: of the whole conversation. seconds: of wall time."""

    turns: int = 16
    tokens: int = 4096
    patches: int = 1 << 30
    seconds: float = 300.0


DEFAULT = Limits()


@dataclasses.dataclass(frozen=True)
class Episode:
    """What was asked, said, answered and drawn, for the reward system to grade.

    source, seed: of the environment and its `reset`.
    transcript: up to the last token that the model drew.
    actions: of the model, one a turn.
    text: what is graded: what the model said last, or what the environment took as the answer.
    reward: the sum of the environment's verdicts; None where it gave none.
    ended: "done"; "turns", "tokens" or "time", the limit that was met; or "failed".
    reason: why it failed, "" if it did not.
    malformed: turns whose calls could not be read.
    info: what the environment's steps said, later ones over earlier ones. sample: what was asked, where it is known.
    """

    source: str
    seed: int
    transcript: Transcript
    actions: tuple[Action, ...]
    text: str
    reward: float | None
    ended: str
    reason: str
    malformed: int
    info: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        """Whether this says nothing about the policy."""
        return self.ended == "failed"

    @property
    def sample(self) -> Sample | None:
        return self.info.get("sample")


class Failed(Exception):
    """An environment did what no environment should."""


class Stopped(Exception):
    """A policy leaves an episode in its turn; the environment waits for an answer and may be reset."""


async def play(environment: Environment, policy: Policy, seed: int, form: Form, limits: Limits = DEFAULT) -> Episode:
    """Plays the episode of a seed. Raises UserError where no other would do better, and what `policy` raises."""
    game = _Game(environment, policy, form, limits)
    reason = ""
    try:
        async with asyncio.timeout(limits.seconds):
            ended = await game.play(seed)
    except TimeoutError:
        ended = "time"
    except Failed as error:
        ended, reason = "failed", str(error)
        log.warning("episode %d of %s failed in turn %d: %s", seed, environment.source, len(game.actions), reason)
    if ended in ("time", "failed"):
        await closed(environment)
    return game.episode(seed, ended, reason)


class _Game:
    """An episode under way."""

    def __init__(self, environment: Environment, policy: Policy, form: Form, limits: Limits):
        self.environment, self.policy, self.limits = environment, policy, limits
        self.form, self.transcript = form, Transcript(form)
        self.actions: list[Action] = []
        self.rewards: list[float] = []
        self.info: dict[str, Any] = {}

    async def play(self, seed: int) -> str:
        """Why it ended."""
        observation = await _trusted(asyncio.to_thread(self.environment.reset, seed))
        tools = observation.tools
        for _ in range(self.limits.turns):
            try:
                self.transcript.observe(observation)
            except Exception as error:  # no policy can answer what cannot be written
                raise Failed(f"its observation is none: {_said(error)}") from error
            room = self.limits.tokens - len(self.transcript)
            if room < 1 or self.transcript.patches > self.limits.patches:
                return "tokens"
            turn = (await self.policy(self.transcript, room)).cut(room)
            self.transcript.draw(turn)
            self.actions.append(self.form.parse(turn.ids, tools))
            step = await _trusted(self.environment.step(self.actions[-1]))
            self._take(step)
            if step.done:
                return "done"
            observation = step.observation
        return "turns"

    def _take(self, step: Step) -> None:
        self.info.update(step.info)
        if step.reward is not None:
            if not math.isfinite(step.reward):
                raise Failed(f"its reward is {step.reward}")
            self.rewards.append(float(step.reward))

    def episode(self, seed: int, ended: str, reason: str) -> Episode:
        said = self.actions[-1].text if self.actions else ""
        return Episode(
            source=self.environment.source, seed=seed, transcript=self.transcript.ended(), actions=tuple(self.actions),
            text=self.info.get("answer", said), reward=sum(self.rewards) if self.rewards else None, ended=ended,
            reason=reason, malformed=sum(bool(action.malformed) for action in self.actions), info=self.info,
        )  # fmt: skip


async def _trusted(answer: Awaitable[T]) -> T:
    """What an environment answers; Failed for what it raises, but for what the person at the keyboard must mend."""
    try:
        return await answer
    except UserError:
        raise
    except Exception as error:
        raise Failed(_said(error)) from error


async def closed(environment: Environment) -> None:
    """Closes it in a thread, whatever it says to that."""
    try:
        await asyncio.to_thread(environment.close)
    except Exception as error:  # it is given up in any case; the next reset says whether it can go on
        log.warning("%s does not close: %s", environment.source, _said(error))


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
