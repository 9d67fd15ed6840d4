"""Episodes in stage 5 (cfg.rollout.environments): the groups that a step plays beside its questions, or in their place.

Each group plays one episode of one environment, and what they say becomes rows behind those of the questions
(`rl.episodes`). Synchronous, `rl.collect` has them played side by side: one that its environment spoils is counted,
played again, and then left out of its group. Asynchronous, they are answers of the pipeline as questions are
(`rl.pipeline.episodes`): a group one of whose answers keeps failing is counted, and another is played in its place.
Environments are kept from step to step.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glmv_jax.rl.arena import Arena
from glmv_jax.rl.collect import Collected, collect
from glmv_jax.rl.episodes import to_rows
from glmv_jax.rl.gym import Environment
from glmv_jax.rl.pipeline.episodes import EpisodeEngine, Joined, Mixture, is_episode
from glmv_jax.rl.pipeline.group import Group
from glmv_jax.rl.pipeline.local import Rows
from glmv_jax.rl.pipeline.slots import SlotEngine
from glmv_jax.rl.play import Episode, Limits
from glmv_jax.rl.prompts import namespaced
from glmv_jax.rl.rewards.grade import Grade
from glmv_jax.rl.rollout import Rollout
from glmv_jax.rl.transcript import Form
from glmv_jax.train.stages.rl_players import Players, number
from glmv_jax.typing import Batch, Params, UserError

if TYPE_CHECKING:
    from glmv_jax.rl.pipeline.remote_rollout import RemoteEngine, RemoteTurns
    from glmv_jax.train.stages.rl import RL

log = logging.getLogger(__name__)


class Episodes:
    """Of one stage that has environments.

    make: an environment of a name.   parts: by data source what grades its episodes (`envs.part`).
    weights: of the questions by task.   groups, questions: of a step, in all cfg.rollout.prompts.
    players: who draws their turns.
    Raises UserError for an environment that cannot be made here, and for limits that rows do not hold.
    """

    def __init__(self, stage: RL) -> None:
        from glmv_jax.rl import envs  # with their graders, which the trainer does not import

        self._stage = stage
        d, r, e = stage.cfg.data, stage.cfg.rollout, stage.cfg.rollout.episodes
        share = {name: float(weight) for name, weight, *_ in r.environments}
        if min(share.values()) <= 0:
            raise UserError(f"rollout.environments={r.environments}: weights are above 0; leave others out")
        self._names, self._share = list(share), np.array(list(share.values())) / sum(share.values())
        self.make = maker(r.environments, stage.data_seed)
        self._sources = {name: _source(self.make(name)) for name in share}
        self.parts = {source: envs.part(name) for name, source in self._sources.items()}
        self.weights = {name: weight for name, weight in d.weights.items() if weight}
        self.groups = _groups(r.prompts, sum(share.values()), sum(self.weights.values()))
        self.questions = r.prompts - self.groups
        self.limits = Limits(e.turns, e.tokens or d.tokens, e.patches or d.patches, e.seconds)
        self._check()
        self._form = Form(stage.tokenizer, stage.asker.patcher)
        self.players = Players(stage, self.limits)
        self.arena = Arena(self._made, e.parallel)

    def _check(self) -> None:
        d, r, limits = self._stage.cfg.data, self._stage.cfg.rollout, self.limits
        if self._stage.asynchronous and not r.get("slots", 0):
            raise UserError("rollout.slots=0: episodes of the asynchronous form are drawn by the engine; set "
                            "rollout.slots, 8 say, or rollout.pipeline=sync")  # fmt: skip
        if r.overlong.buffer:
            raise UserError("rollout.overlong counts the tokens of one answer, and episodes have many; set "
                            "rollout.overlong.buffer=0 with rollout.environments")  # fmt: skip
        if r.episodes.rows < 1:
            raise UserError("rollout.episodes.rows=0: episodes need rows of an update to be trained on; give some")
        if limits.tokens > d.tokens or limits.patches > d.patches:
            raise UserError(f"episodes of {limits.tokens} tokens and {limits.patches} patches do not fit rows of "
                            f"{d.tokens} and {d.patches}; raise data.tokens, data.patches")  # fmt: skip
        if (drawn := limits.turns * r.max_new_tokens) > d.targets:
            raise UserError(f"episodes of {limits.turns} turns of {r.max_new_tokens} tokens are {drawn}, and rows "
                            f"learn {d.targets}; raise data.targets or lower rollout.episodes.turns")  # fmt: skip

    def close(self) -> None:
        """Ends the engine, if there is one, and the environments."""
        self.players.close()
        self.arena.close()

    def group(self, number_: int) -> tuple[str, int]:
        """The environment and the seed of the run's group of that number."""
        drawn = np.random.default_rng((self._stage.data_seed, number_)).choice(self._names, p=self._share)
        return str(drawn), number(f"{self._stage.data_seed}/{number_}")

    # --- synchronous --------------------------------------------------------------------------------------------------

    def play(self, first: int, params: Params, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """The records of a step's groups, whose numbers in the run begin with `first`; and metrics by source, see
        `_told`. Their rows count on from the questions'."""
        r, played = self._stage.cfg.rollout, []

        trace = self._stage.samples.trace

        async def graded(episode: Episode) -> Grade:
            played.append(episode)
            with trace.span("reward", episode.source):
                return await self._stage.grading.episode(episode)

        groups = [self.group(n) for n in range(first, first + self.groups)]
        self.players.begin(params, step)
        try:
            with trace.span("rollout", f"episodes of step {step}"):
                found = asyncio.run(collect(
                    self.arena, self.players, graded, groups, self._form, size=r.group, tries=r.episodes.tries,
                    limits=self.limits, compare=self._stage.grading.compared,
                ))  # fmt: skip
        except BaseExceptionGroup as errors:  # of tasks: the first says what has to be mended
            raise _first(errors) from errors
        finally:
            self.players.end()
        records = [dataclasses.replace(record, row=self.questions + record.row) for record in found.records]
        return records, self._told(played, found)

    def _told(self, played: Sequence[Episode], found: Collected) -> dict[str, float]:
        """By source, counts: failed (those that were played again too), silent (over before the model said anything);
        and `_means` of those that were graded."""
        metrics = _means(
            (episode.source, len(episode.actions), episode.malformed, episode.ended != "done") for episode in played
        )
        for source in self.parts:
            failed, silent = (sum(e.source == source for e in episodes) for episodes in (found.failed, found.silent))
            metrics |= {f"failed/{source}": float(failed), f"silent/{source}": float(silent)}
            if silent and f"turns/{source}" not in metrics:
                log.warning(
                    "%s: all %d episodes of this step ended before the model could say anything, so nothing is learnt "
                    "from it; raise data.tokens, data.patches (and rollout.episodes.tokens, .patches) until a first "
                    "observation and an answer fit", source, silent,
                )  # fmt: skip
        return metrics

    # --- asynchronous -------------------------------------------------------------------------------------------------

    def prompts(self, rows: Rows | None) -> Mixture:
        """Of the pipeline: in the order of the synchronous steps. rows: of the questions, if there are any."""

        def episode(number_: int) -> tuple[str, str, int]:
            name, seed = self.group(number_)
            return name, self._sources[name], seed

        return Mixture(rows, self.questions, self.groups, episode)

    def engine(
        self, rows: Rows | None, answers: RemoteEngine | None = None, turns: RemoteTurns | None = None
    ) -> Joined:
        """Of the pipeline: one inference engine draws answers and turns. answers, turns: who draws in its place."""
        ask: Any = turns or self.players.ask
        played = EpisodeEngine(self.arena, ask, self._form, self.limits, self._stage.cfg.rollout.max_new_tokens)
        return Joined(answers or self.questioned(rows), played)

    def questioned(self, rows: Rows | None) -> SlotEngine:
        """Draws the answers to questions with the engine that `players` draw turns with."""
        stage = self._stage
        return SlotEngine(self.players.start, rows, stage.cfg.seed, stage.tokenizer, stage.limits)

    def _made(self, name: str) -> Environment:
        """For the arena: here, or by one of the environment workers."""
        return self._stage.roles.environment(name, self._sources[name]) or self.make(name)

    def told(self, groups: Sequence[Group]) -> dict[str, float]:
        """By source, of the episodes of a batch: `_means`, and thrown_away, tokens that could not be gone on from."""
        thrown: collections.Counter[str] = collections.Counter()
        rows = []
        for group in groups:
            for facts in (member.answer.facts for member in group.members if is_episode(group.prompt)):
                rows.append((group.prompt.source, facts["turns"], facts["malformed"], facts["ended"] != "done"))
                thrown[group.prompt.source] += facts["thrown_away"]
        return _means(rows) | {f"thrown_away/{source}": float(count) for source, count in thrown.items()}

    # --- rows ---------------------------------------------------------------------------------------------------------

    def rows(self, records: Sequence[Rollout]) -> list[tuple[Batch, float]]:
        """The rows of each update, and the share of its episodes that found no room in them."""
        stage, d, r = self._stage, self._stage.cfg.data, self._stage.cfg.rollout
        updates, advantages_N = self._learnt(records)
        made = []
        for of in updates:
            batch, left_out = to_rows(
                [records[n] for n in of], advantages_N[of], rows=(r.episodes.rows,), tokens=d.tokens,
                patches=d.patches, channels=stage.asker.patcher.channels, image=stage.tokenizer.image,
                names=stage.names, targets=d.targets, images=d.get("images", 0) or None, per="token",
            )  # fmt: skip
            made.append((batch, left_out / max(1, len(of))))
        return made

    def behind(
        self, parts: Sequence[tuple[Batch, dict[str, float]]], records: Sequence[Rollout]
    ) -> list[tuple[Batch, dict[str, float]]]:
        """For each update the rows of its questions, where there are any, and those of these episodes behind them.
        parts: rows of questions and what is told of them."""
        played, found = self.rows(records), []
        for (rows, told), (episodes, without_room) in zip(parts or [({}, {})] * len(played), played):
            both = {name: np.concatenate([rows[name], x]) if rows else x for name, x in episodes.items()}
            found.append((both, told | {"left_out/episodes": without_room}))
        return found

    def _learnt(self, records: Sequence[Rollout]) -> tuple[list[list[int]], np.ndarray]:
        """The records of each update, by their place, and the advantage of each. Groups that lost some of their
        episodes are smaller; one that is left alone has nothing to be compared with."""
        groups: dict[int, list[int]] = collections.defaultdict(list)
        for n, record in enumerate(records):
            groups[record.row].append(n)
        by_size: dict[int, list[list[int]]] = collections.defaultdict(list)
        for group in groups.values():
            by_size[len(group)].append(group)
        updates: list[list[int]] = [[] for _ in range(self._stage.cfg.rollout.minibatches)]
        advantages_N = np.zeros(len(records), np.float32)
        for size in sorted(by_size.keys() - {1}, reverse=True):
            at_NG = np.array(by_size[size])
            chosen, advantages_NG = self._stage.chosen([records[n] for n in at_NG.flat], size)
            advantages_N[at_NG] = advantages_NG
            for update, of in zip(sorted(updates, key=len), chosen):  # the first has the most
                update += at_NG.reshape(-1)[of].tolist()
        return updates, advantages_N


def maker(environments: Sequence[Sequence[Any]], seed: int) -> Callable[[str], Environment]:
    """What makes cfg.rollout.environments by name. seed: of the stage's data."""
    from glmv_jax.rl import envs

    options = {name: dict(*given) for name, _, *given in environments}
    return lambda name: envs.make(name, "train", namespaced("rl", seed), **options[name])


class Mixed:
    """The data of steps with episodes: a batch of questions, where there are any, and under "episodes" the number in
    the run of the step's first group of episodes."""

    def __init__(self, questions: Any | None, groups: int) -> None:
        self._questions, self._groups, self._first = questions, groups, 0

    def __next__(self) -> Batch:
        batch = {} if self._questions is None else next(self._questions)
        first, self._first = self._first, self._first + self._groups
        return {**batch, "episodes": first}

    def get_state(self) -> dict[str, Any]:
        questions = None if self._questions is None else self._questions.get_state()
        return {"episodes": self._first, "questions": questions}

    def set_state(self, state: dict[str, Any]) -> None:
        self._first = state["episodes"]
        if self._questions is not None:
            self._questions.set_state(state["questions"])

    def close(self) -> None:
        if self._questions is not None:
            self._questions.close()


def _means(rows: Iterable[tuple[str, int, int, bool]]) -> dict[str, float]:
    """By source the means over episodes: turns, malformed ones among them, and limited, the share that met a limit."""
    by: dict[str, list[tuple]] = collections.defaultdict(list)
    for source, *numbers in rows:
        by[source].append(tuple(numbers))
    return {
        f"{what}/{source}": float(np.mean(x))
        for source, numbers in by.items()
        for what, x in zip(("turns", "malformed", "limited"), zip(*numbers))
    }


def _source(environment: Environment) -> str:
    try:
        return environment.source
    finally:
        environment.close()


def _groups(prompts: int, episodes: float, questions: float) -> int:
    """How many of a step's prompts are episodes: their share by weight, and at least one of each where both are."""
    if not questions:
        return prompts
    if prompts < 2:
        raise UserError("rollout.prompts=1 cannot be shared by questions and episodes; raise it")
    return min(max(1, round(prompts * episodes / (episodes + questions))), prompts - 1)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
