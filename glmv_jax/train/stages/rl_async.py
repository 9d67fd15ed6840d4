"""The asynchronous form of stage 5: rollouts, rewards and rows made beside the training (`rl.pipeline`), in threads or,
with cfg.rollout.workers, in processes on any number of machines (`rl_workers`).

The engine gets the weights of every update while it goes on drawing; a batch is of groups that are old by at most
cfg.rollout.staleness updates, token by token.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front
from glmv_jax.inference.settings import Settings as EngineSettings
from glmv_jax.rl.batch import for_ranks
from glmv_jax.rl.curriculum import useful
from glmv_jax.rl.metrics import summary
from glmv_jax.rl.pipeline import Group, Scheduler, Settings
from glmv_jax.rl.pipeline.background import Background, Parts
from glmv_jax.rl.pipeline.driver import Taken
from glmv_jax.rl.pipeline.episodes import is_episode
from glmv_jax.rl.pipeline.episodes import records as of_episodes
from glmv_jax.rl.pipeline.local import Rows, SamplerEngine, rollouts
from glmv_jax.rl.pipeline.slots import SlotEngine
from glmv_jax.rl.rollout import Rollout
from glmv_jax.rl.tiers import Tiers
from glmv_jax.train.stages import rl_questions, rl_served
from glmv_jax.train.stages.rl_samples import add_trained
from glmv_jax.typing import Batch, Params, UserError

if TYPE_CHECKING:
    from glmv_jax.train.stages.rl import RL


# By cfg.rollout.quotas: what prompts count as, of which every batch holds as many as were drawn for it.
KINDS = {
    "": None,
    "form": lambda prompt: "episodes" if is_episode(prompt) else "questions",
    "source": lambda prompt: prompt.source,
}


class Asynchronous:
    """Of one stage."""

    def __init__(self, stage: RL) -> None:
        self._stage = stage

    def check(self) -> None:
        """UserError for updates that are less than a batch, and for quotas that there are not."""
        if (r := self._stage.cfg.rollout).minibatches != 1:
            raise UserError(f"rollout.minibatches={r.minibatches}: with rollout.pipeline='async' every batch of groups "
                            "is one update; set minibatches=1, and fewer prompts")  # fmt: skip
        if r.get("quotas", "") not in KINDS:
            raise UserError(f"rollout.quotas={r.quotas!r} is not known; choose one of {', '.join(map(repr, KINDS))}")

    def open(self) -> Background:
        """The data: a pipeline that waits for the first weights."""
        stage, r = self._stage, self._stage.cfg.rollout
        settings = Settings(
            r.prompts, r.group, staleness=r.staleness, late=r.late, in_flight=r.in_flight, seconds=r.seconds or None
        )
        self._rows: Any = self.rows()
        self._expansion = rl_questions.expansion(stage.cfg)
        prompts: Any = stage.episodes.prompts(self._rows) if stage.episodes else self._rows

        def scheduler(note: Callable[[dict[str, Any]], None]) -> Scheduler:
            keep = useful if r.dynamic else None
            self._scheduler = Scheduler(prompts, settings, note, keep, KINDS[r.get("quotas", "")])
            return self._scheduler

        async def build(step: int, groups: Sequence[Group]) -> Any:
            del step
            return await asyncio.to_thread(self._batch, groups)

        def close() -> None:
            for part in (stage.roles, stage.grading, stage.samples):
                part.close()

        stage.roles.open()
        stage.grading.open(stage.roles.grader())
        parts = Parts(scheduler, self._engine(), stage.grading.answers(self._rows), build, close)
        data = Background(parts, stage.samples.run)
        stage.roles.loop, stage.others.trace = data.loop, data.trace
        return data

    def rows(self) -> Rows | None:
        """Where questions come from; None where there are none."""
        stage = self._stage
        return rl_questions.rows(stage) if stage.episodes is None or stage.episodes.weights else None

    def next_batch(self, data: Background, state: Any) -> tuple[Batch, Batch, dict[str, float]]:
        """The rows of an update, what other policies say of them, and metrics."""
        stage, version = self._stage, int(state.step)  # which is known when the update before has ended
        stage.others.prefetch()
        # A copy, as the engine draws with it while the step that follows takes the memory of the state.
        copied = jax.device_get if stage.roles.counts["rollout"] else lambda params: jax.tree.map(jnp.copy, params)
        taken, drawn = data.exchange(copied(state.params), version)
        rows, left_out, records = taken.batch
        rows = for_ranks(rows, stage.ranks)
        others = stage.others.said_of([rows], state.params)[0]
        answers = [row for row in drawn if row["kind"] == "sample"]
        answers.sort(key=lambda row: isinstance(row["key"], dict))  # as the records are: questions, then episodes
        add_trained(answers, records, [rows], [others])
        if stage.samples.folder is not None:
            data.keep([*stage.samples.asked(answers, records), *drawn])
        told = self._told(taken, drawn) | stage.grading.metrics() | stage.roles.metrics()
        return rows, others, summary(drawn) | left_out | told

    def _engine(self) -> Any:
        stage, (answers, turns) = self._stage, self._stage.roles.engines()
        if stage.episodes:
            return stage.episodes.engine(self._rows, answers, turns)
        if stage.cfg.rollout.get("engine", ""):
            return rl_served.engine(stage, self._rows)
        return answers or self.engine(self._rows)

    def engine(self, rows: Any, engines: int = 1) -> SlotEngine | SamplerEngine:
        """Of questions alone, in this process. engines: how many there are of it."""
        stage, r = self._stage, self._stage.cfg.rollout
        if r.get("slots", 0):
            return SlotEngine(self._front, rows, stage.cfg.seed, stage.tokenizer, stage.limits)
        key = jax.random.key(stage.cfg.seed)
        return SamplerEngine(stage.sampler, rows, -(-r.prompts // engines), key, stage.tokenizer, engines > 1)

    def _front(self, params: Params, version: int) -> Front:
        """The inference engine in a thread of its own."""
        stage, r = self._stage, self._stage.cfg.rollout
        longest, patches = stage.asker.max_tokens, stage.asker.max_patches
        sizes = EngineSettings(
            slots=r.slots, length=longest + stage.longest, chunks=(min(64, longest), longest), patches=(patches,),
            pictures=r.prompts * patches // 4, queue=4 * r.slots, drafts=rl_questions.drafts(stage),
        )  # fmt: skip
        engine = Engine(stage.model, params, stage.sampler.sampling, sizes, version=version)
        engine.warm()
        return Front(engine)

    def _batch(self, groups: Sequence[Group]) -> tuple[Batch, dict[str, float], list[Rollout]]:
        """The rows of the pipeline's groups, what is told of them, and their records."""
        stage = self._stage
        asked = [group for group in groups if not is_episode(group.prompt)]
        records, batch = rollouts(asked, self._rows) if asked else ([], stage.no_prompts())
        if stage.episodes is None:
            stage.samples.show(records, batch)
            return *next(iter(stage.packed(records, batch))), records
        parts = list(stage.packed(records, batch)) if stage.episodes.questions else []
        played = [group for group in groups if is_episode(group.prompt)]
        episodes = of_episodes(played)
        ((both, told),) = stage.episodes.behind(parts, episodes)
        stage.samples.show([*records, *episodes], batch)
        return both, told | stage.episodes.told(played), [*records, *episodes]

    def _told(self, taken: Taken, drawn: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Groups of the batch by source; what the curriculum has learnt; and how much more is asked than a batch holds:
        groups that teach nothing are replaced in any case, but where a batch waits for none (late) as many more begin
        at once."""
        stage, scheduler, most = self._stage, self._scheduler, self._scheduler.settings.most_in_flight
        groups = collections.Counter(group.prompt.source for group in taken.groups)
        metrics = {f"groups/{name}": float(groups[name]) for name in stage.names}
        metrics |= self._rows.metrics() if isinstance(self._rows, Tiers) else {}
        if (expansion := self._expansion) is None:
            return metrics
        if expansion.ratio == 1.0:  # of a run that goes on
            expansion.ratio = max(1.0, scheduler.in_flight / most)
        useless = sum(row["kind"] == "filtered" for row in drawn)
        asked = useless + len(taken.groups)
        metrics |= {"asked": float(asked), "useful": 1.0 - useless / asked}
        metrics["expansion"] = expansion.update(useless, asked)
        if scheduler.settings.late != "wait":
            scheduler.in_flight = expansion.groups(most)
        return metrics
