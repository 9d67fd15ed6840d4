"""Episodes as answers of the pipeline: a request plays one, its answer is all that follows the first observation.

Tokens that the environment said are of version -1, the others of the weights that drew each, which may change within an
episode and within a turn. An aborted episode ends at once with what has been drawn. To go on, an environment is played
by the turns there are: it must say what it said before, to the token; where it does not, they are thrown away and
counted, and the episode begins anew. Episodes that are complete go the same way over a restart: their pixels are not
saved, their tokens are, and nothing is drawn for them again.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.data.building import Document
from glmv_jax.inference import requests
from glmv_jax.inference.front import Ticket
from glmv_jax.rl.arena import Arena
from glmv_jax.rl.episodes import record
from glmv_jax.rl.pipeline.group import Group
from glmv_jax.rl.pipeline.local import Rows, nothing
from glmv_jax.rl.pipeline.protocols import Completion, Drawn, OnDone, Prompt, Request
from glmv_jax.rl.play import Episode, Limits, Stopped
from glmv_jax.rl.rollout import Rollout
from glmv_jax.rl.transcript import Form, Transcript, Turn
from glmv_jax.typing import Params

log = logging.getLogger(__name__)

# (request, conversation so far, tokens there is room for, number of the turn, a turn begun) -> what draws it
Ask = Callable[[Request, Document, int, int, requests.Completion | None], Ticket]


class Mixture:
    """`Prompts` that are questions and episodes in turn, so many of a step each.

    rows: the `Prompts` of the questions; None without.
    episode: of a number: the environment's name, its source and a seed.
    """

    def __init__(
        self, rows: Rows | Any, questions: int, episodes: int, episode: Callable[[int], tuple[str, str, int]]
    ) -> None:
        self._rows, self._questions, self._episodes, self._episode = rows, questions, episodes, episode
        self._drawn = 0

    def draw(self) -> Prompt:
        uid, self._drawn = self._drawn, self._drawn + 1
        step, at = divmod(uid, self._questions + self._episodes)
        if at < self._questions:
            return dataclasses.replace(self._rows.draw(), uid=uid)
        name, source, seed = self._episode(step * self._episodes + at - self._questions)
        return Prompt(uid, {"environment": name, "seed": seed}, source)

    def learn(self, groups: Sequence[Group]) -> None:
        """The order of episodes is fixed, that of questions may be a curriculum's."""
        if asked := [group for group in groups if not is_episode(group.prompt)]:
            self._rows.learn(asked)

    def get_state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "rows": self._rows and self._rows.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._drawn = state["drawn"]
        if self._rows is not None:
            self._rows.set_state(state["rows"])


def is_episode(prompt: Prompt) -> bool:
    """Whether it is one of `Mixture`'s episodes."""
    return isinstance(prompt.key, dict)


def records(groups: Sequence[Group]) -> list[Rollout]:
    """Of complete groups of episodes, group by group."""
    return [
        record(member.answer.episode, member.grade, n) for n, group in enumerate(groups) for member in group.members
    ]


class Joined:
    """An engine for questions and one for episodes as one; they draw with the same weights.

    questions: gets the weights and ends last.
    """

    def __init__(self, questions: Any, episodes: EpisodeEngine) -> None:
        self._questions, self._episodes = questions, episodes
        self.set_params: Callable[[Params, int], Any] = questions.set_params

    def submit(self, request: Request, on_done: OnDone) -> None:
        engine = self._episodes if is_episode(request.prompt) else self._questions
        engine.submit(request, on_done)

    def abort(self, id: int) -> None:
        self._episodes.abort(id)
        self._questions.abort(id)

    def close(self) -> None:
        self._episodes.close()
        self._questions.close()


class EpisodeEngine:
    """An `Engine` whose requests play episodes in an arena. Of one event loop; `close` is called from outside of it.

    ask: has a turn drawn.   longest: tokens of a turn, at most.
    """

    def __init__(self, arena: Arena, ask: Ask, form: Form, limits: Limits, longest: int) -> None:
        self.arena, self.ask, self.form, self.limits, self.longest = arena, ask, form, limits, longest
        self._playing: dict[int, _Playing] = {}
        self._tasks: set[asyncio.Task] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, request: Request, on_done: OnDone) -> None:
        self._loop = asyncio.get_running_loop()
        self._playing[request.id] = playing = _Playing(self, request, on_done)
        task = self._loop.create_task(playing.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def abort(self, id: int) -> None:
        if (playing := self._playing.get(id)) is not None:
            playing.stop()

    def over(self, id: int) -> None:
        """Called when a request has been answered; its environment may still be at work."""
        self._playing.pop(id, None)

    def close(self) -> None:
        """Ends what is played, and the arena."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self.arena.close()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Differs(Stopped):
    """The environment does not say what it said before."""


class _Playing:
    """A request under way."""

    def __init__(self, engine: EpisodeEngine, request: Request, on_done: OnDone) -> None:
        self._engine, self._request, self._on_done = engine, request, on_done
        self._before = request.prefix or nothing()  # what has to be played again
        self._thrown_away = 0  # tokens
        self._transcript: Transcript | None = None
        self._first = 0  # of its tokens that follow the first observation
        self._ticket: Ticket | None = None
        self._stopped = self._told = False

    def stop(self) -> None:
        """What has been drawn is the answer, from now on or as soon as the turn under way has been stopped. Nobody
        waits for an environment that is at work: it may be long."""
        self._stopped = True
        if self._ticket is not None:
            self._ticket.abort()
        else:
            self._tell(self._drawn(), "aborted")

    async def run(self) -> None:
        """Plays it and tells what came of it."""
        try:
            self._end(await self._episode())
        except Stopped:
            self._tell(self._drawn(), "aborted")
        except Exception as error:  # the answer failed, which is data
            log.warning("episode %s: %s", self._request.prompt.key, error, exc_info=True)
            self._fail(f"{type(error).__name__}: {error}")

    async def _episode(self) -> Episode:
        try:
            episode = await self._played()
            said = self._said()
            if episode.failed or len(said) >= len(self._before) and self._agrees(said.tokens):
                return episode
        except _Differs:
            pass
        self._thrown_away = int((self._before.versions >= 0).sum())
        self._before, self._transcript = nothing(), None
        return await self._played()

    async def _played(self) -> Episode:
        key, engine = self._request.prompt.key, self._engine
        wanted = lambda: not self._stopped  # noqa: E731
        return await engine.arena.play(
            key["environment"], self._policy, key["seed"], engine.form, engine.limits, wanted=wanted
        )

    async def _policy(self, transcript: Transcript, room: int) -> Turn:
        if not transcript.turns:
            self._first = len(transcript)
        self._transcript = transcript
        if self._stopped:
            raise Stopped
        begun = self._said_before(transcript)
        if begun is not None and self._whole(begun, room):
            return begun
        self._ticket = self._engine.ask(self._request, transcript.document(), room, transcript.turns, _begun(begun))
        try:
            answer = await self._ticket.answer()
        finally:
            self._ticket = None
        turn = Turn.of(answer.tokens, answer.logprobs, answer.versions)
        if self._stopped:
            self._tell(self._drawn(turn), "aborted")
            raise Stopped
        return turn

    def _said_before(self, transcript: Transcript) -> Turn | None:
        """The turn that comes next of those that are played again. _Differs if they do not fit here."""
        said, before = transcript.tokens[self._first :], self._before
        if not self._agrees(said):
            raise _Differs
        if len(said) >= len(before):
            return None
        rest = before.versions[len(said) :]
        turn = slice(len(said), len(said) + int(np.argmin(np.append(rest, -1) >= 0)))
        if turn.start == turn.stop:
            raise _Differs
        return Turn(before.tokens[turn], before.logprobs[turn], before.versions[turn])

    def _agrees(self, said: np.ndarray) -> bool:
        """Whether, as far as both go, this is what was said before."""
        both = min(len(said), len(self._before))
        return np.array_equal(said[:both], self._before.tokens[:both])

    def _whole(self, turn: Turn, room: int) -> bool:
        stops = self._engine.form.tokenizer.stops
        return int(turn.ids[-1]) in stops or len(turn.ids) >= min(room, self._engine.longest)

    def _drawn(self, turn: Turn | None = None) -> Drawn:
        """What there is to go on from; turn: the one under way."""
        said = self._said(turn)
        return said if len(said) >= len(self._before) else self._before

    def _said(self, turn: Turn | None = None) -> Drawn:
        """Up to the last token that was drawn in this environment."""
        if self._transcript is None:
            return nothing()
        script = copy.copy(self._transcript)
        if turn is not None:
            script.draw(turn)
        script = script.ended()
        return Drawn(*(getattr(script, name)[self._first :] for name in ("tokens", "logprobs", "versions")))

    # --- what came of it ----------------------------------------------------------------------------------------------

    def _end(self, episode: Episode) -> None:
        if episode.failed:
            self._fail(episode.reason)
        elif not episode.transcript.turns:
            self._fail(f"it was over ({episode.ended}) before the model could say anything; raise data.tokens and "
                       "data.patches (and rollout.episodes.tokens, .patches) until a first observation and an answer "
                       "fit")  # fmt: skip
        else:
            drawn = self._drawn()
            whole = int(drawn.tokens[-1]) in self._engine.form.tokenizer.stops
            facts = {
                "id": f"{episode.source}/{episode.seed}", "text": episode.text, "turns": len(episode.actions),
                "malformed": episode.malformed, "ended": episode.ended, "thrown_away": self._thrown_away,
            }  # fmt: skip
            self._tell(drawn, "stop" if whole else "length", facts, episode)

    def _fail(self, error: str) -> None:
        self._tell(nothing(), "failed", {"error": error})

    def _tell(self, drawn: Drawn, reason: str, facts: dict[str, Any] | None = None, episode: Any = None) -> None:
        if not self._told:
            self._told = True
            self._engine.over(self._request.id)
            self._on_done(Completion(drawn, reason, facts or {}, episode))


def _begun(turn: Turn | None) -> requests.Completion | None:
    return None if turn is None else requests.Completion(turn.ids, turn.logprobs, turn.versions, "aborted")
