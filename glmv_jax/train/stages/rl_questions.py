"""The questions of stage 5 and, in its synchronous form, the answers to those of a step.

By default a step asks the next cfg.rollout.prompts of the mixture. With cfg.rollout.curriculum more of those are asked
that the policy can do half of the time (`rl.tiers`). With cfg.rollout.dynamic as many more are asked as will teach
nothing, by what was useless in the steps before, and the most balanced of the useful groups are trained on (GLM-V,
section 5.3). What a group teaches is told by its rewards as they were graded, before any shaping by length.

Of several processes each asks cfg.rollout.prompts questions of its own, and answers them with a copy of the weights on
its first device (`multihost.own_copy`); the update is of the rows of all. What is told and kept of rollouts is the
first one's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from glmv_jax.data.tokenizer import BOX
from glmv_jax.inference import drafting_programs
from glmv_jax.inference.sampler import Sampling
from glmv_jax.parallel import multihost
from glmv_jax.rl.curriculum import Expansion, kept, useful
from glmv_jax.rl.pipeline import Group, Member
from glmv_jax.rl.pipeline.local import Rows
from glmv_jax.rl.prompts import prompt_rows
from glmv_jax.rl.rollout import Rollout, rollout
from glmv_jax.rl.tiers import Tiers
from glmv_jax.typing import Batch, Params, UserError

if TYPE_CHECKING:
    from glmv_jax.data.records import Sample
    from glmv_jax.rl.rewards.grade import Grade
    from glmv_jax.train.stages.rl import RL


OTHERS = 1_000_003  # between the seeds of processes


class Answered(NamedTuple):
    """records: what is trained on, groups beside each other; batch: of prompts, in which they count.
    graded: all that was answered, trained on or not.   metrics: beside those of `graded`."""

    records: Sequence[Rollout]
    batch: Batch
    graded: Sequence[Rollout]
    metrics: dict[str, float]


def sampling(stage: RL) -> Sampling:
    """How answers are drawn: with cfg.rollout.thinking they begin with so many tokens of thinking at most.

    UserError where nothing is left for the answer, and for episodes, whose turns have no such limit; for nuclei, which
    are no distribution that the update knows (GLM-V, 5.3.2, found text garbled by them); and see `drafts`.
    """
    r, settings = stage.cfg.rollout, {}
    drafts(stage)
    _check_processes(stage)
    if r.top_p < 1:
        raise UserError(f"rollout.top_p={r.top_p} draws from a part of the policy's distribution, and what is trained "
                        "on are log-probabilities under all of it; set rollout.top_p=1.0")  # fmt: skip
    if think := r.get("thinking", 0):
        if stage.episodes:
            raise UserError("rollout.thinking is of questions; set it to 0 with rollout.environments")
        if not 0 < think < r.max_new_tokens - 1:
            raise UserError(f"rollout.thinking={think} leaves no room for an answer in rollout.max_new_tokens="
                            f"{r.max_new_tokens}; raise that")  # fmt: skip
        close = stage.tokenizer.special["</think>"]
        settings = {"think": think, "close": close, "allow": (*BOX, "</think>")}
    return Sampling.chat(stage.tokenizer, r.max_new_tokens, temperature=r.temperature, top_p=r.top_p, **settings)


def _check_processes(stage: RL) -> None:
    """UserError for what several processes cannot do, or not without knowing of each other."""
    r, n = stage.cfg.rollout, jax.process_count()
    if n == 1:
        return
    if stage.asynchronous or r.dynamic or curriculum(stage.cfg):
        raise UserError(
            f"{n} processes: rollout.pipeline=async, rollout.dynamic and rollout.curriculum keep a state that each "
            "would have another of; use the synchronous form without them, or one process"
        )
    if len(r.rows) > 1:
        raise UserError(
            f"{n} processes: rollout.rows={tuple(r.rows)} lets each choose another number, and a batch is of all; give "
            f"one, {max(r.rows)} say"
        )


def drafts(stage: RL) -> int:
    """Tokens that the MTP head drafts a step of decoding (cfg.rollout.drafts): answers come in fewer passes, and their
    distribution and log-probabilities are the policy's own (`inference.drafting_programs`).

    UserError where no engine of this process draws, and for a model that cannot draft.
    """
    r = stage.cfg.rollout
    if not (count := r.get("drafts", 0)):
        return 0
    if not r.get("slots", 0) or r.get("engine", ""):
        raise UserError(
            f"rollout.drafts={count} are of an engine of the run's own; set rollout.slots, 8 say, and leave "
            "rollout.engine empty (a server has its own: glmv serve --speculative)"
        )
    drafting_programs.check(stage.model, count)
    return count


def limits(stage: RL) -> dict[str, int]:
    """Tokens of an answer by kind, where it is not cfg.rollout.max_new_tokens.

    UserError for kinds that are not asked, and for what counts or draws all answers to one length.
    """
    r = stage.cfg.rollout
    if not (found := dict(r.get("limits", ()))):
        return {}
    if unknown := set(found) - set(stage.cfg.data.weights):
        raise UserError(f"rollout.limits: {min(unknown)!r} is no source of data.weights; leave it out")
    if not r.get("slots", 0) or r.get("engine", ""):
        raise UserError("rollout.limits are of answers that are written one by one, in this process; set rollout.slots,"
                        " 128 say, and leave rollout.engine empty")  # fmt: skip
    if stage.episodes and not stage.asynchronous:
        raise UserError("rollout.limits with rollout.environments: in the synchronous form such questions are drawn to "
                        "one length; set rollout.pipeline=async")  # fmt: skip
    if r.overlong.buffer:
        raise UserError("rollout.overlong.buffer counts from one length of all answers, and rollout.limits gives some "
                        "kinds another; set one of the two")  # fmt: skip
    if min(found.values()) < (least := stage.sampler.sampling.think + 2):
        raise UserError(f"rollout.limits={r.limits}: answers have at least {least} tokens here; raise the least")
    return found


def rows(stage: RL) -> Rows:
    """Where the prompts of the run come from one by one: in the order of the mixture, or of a curriculum."""
    cfg = stage.cfg
    weights = stage.episodes.weights if stage.episodes else dict(cfg.data.weights)
    common: dict[str, Any] = {"seed": stage.data_seed, "faults": cfg.faults or None}
    if not curriculum(cfg):
        return Rows(prompt_rows(weights, stage.questioner, **common))
    settings = {name: cfg.rollout.curriculum[name] for name in ("w_min", "decay")}
    return Tiers(weights, stage.questioner, **common, **settings)


def curriculum(cfg: Any) -> bool:
    """Whether there is one."""
    return bool(cfg.rollout.get("curriculum", {}).get("on", False))


def expansion(cfg: Any) -> Expansion | None:
    """How many more prompts are asked, where that is to change."""
    return Expansion(**cfg.rollout.get("expansion", {})) if cfg.rollout.dynamic else None


def answered(stage: RL, batch: Batch, params: Params, step: int, call: int = 0) -> list[Rollout]:
    """Graded answers to a batch of prompts. call: of the step; each draws with a key of its own."""
    key = jax.random.fold_in(jax.random.key(own_seed(stage)), step)
    key = jax.random.fold_in(key, call) if call else key
    params, trace, name = multihost.own_copy(params), stage.samples.trace, f"step {step}"
    begun = trace.clock()

    def drawn() -> None:
        trace.add("rollout", name, begun)
        stage.others.prefetch()

    def score(samples: Sequence[Sample], texts: Sequence[str]) -> list[Grade]:
        with trace.span("reward", name):
            return stage.grading.score(samples, texts)

    more: dict[str, Any] = {"sampled": drawn, "limits": stage.limits}
    return rollout(stage.drawing(params), params, batch, key, stage.tokenizer, score, **more)


def own_seed(stage: RL) -> int:
    """Of what this process draws with."""
    return stage.cfg.seed + OTHERS * jax.process_index()


class Asking:
    """The data of steps that draw their prompts themselves, when they ask them; `answers` is what they get.

    groups: of a batch. They are asked at once, and what goes beyond them a quarter of that number at a time, so that
    there are two shapes to compile.
    """

    def __init__(self, stage: RL, groups: int) -> None:
        self._stage, self._groups = stage, groups
        self._rows, self._expansion = rows(stage), expansion(stage.cfg)

    def __next__(self) -> Batch:
        return {"asking": self}

    def get_state(self) -> dict[str, Any]:
        return {"prompts": self._rows.get_state(), "ratio": self._expansion and self._expansion.ratio}

    def set_state(self, state: dict[str, Any]) -> None:
        self._rows.set_state(state["prompts"])
        if self._expansion and state["ratio"]:
            self._expansion.ratio = state["ratio"]

    def close(self) -> None:
        """Nothing runs beside the step."""

    def answers(self, params: Params, step: int) -> Answered:
        """Those of a step with these weights. The curriculum learns of all of them at once."""
        count = self._expansion.groups(self._groups) if self._expansion else self._groups
        prompts = [self._rows.draw() for _ in range(count)]
        graded: list[Rollout] = []
        for call, (first, size) in enumerate(_calls(count, self._groups)):
            batch = self._rows.batch([prompt.key for prompt in prompts[first : first + size]], size)
            graded += _moved(answered(self._stage, batch, params, step, call), first)
        size = self._stage.sampler.group
        groups = [
            Group(prompt, [Member(grade=record.grade) for record in graded[n * size : (n + 1) * size]])
            for n, prompt in enumerate(prompts)
        ]
        self._rows.learn(groups)
        chosen = kept(groups, self._groups) if self._expansion else list(range(count))
        records = [record for n, g in enumerate(chosen) for record in _moved(graded[g * size : (g + 1) * size], n - g)]
        metrics = self._rows.metrics() if isinstance(self._rows, Tiers) else {}
        if self._expansion:
            useless = sum(not useful(group) for group in groups)
            metrics |= {"asked": float(count), "useful": 1.0 - useless / count}
            metrics["expansion"] = self._expansion.update(useless, count)
        return Answered(records, self._rows.batch([prompts[g].key for g in chosen]), graded, metrics)


class Fixed:
    """Answers to a batch of prompts that the data have made."""

    def __init__(self, stage: RL, batch: Batch) -> None:
        self._stage, self._batch = stage, batch

    def answers(self, params: Params, step: int) -> Answered:
        if "tokens" not in self._batch:  # episodes alone
            self._stage.others.prefetch()
            return Answered((), self._batch, (), {})
        records = answered(self._stage, self._batch, params, step)
        return Answered(records, self._batch, records, {})


def _calls(count: int, groups: int) -> list[tuple[int, int]]:
    """(first prompt, size) of each call of the sampler."""
    few = max(1, groups // 4)
    return [(0, groups), *((first, few) for first in range(groups, count, few))]


def _moved(records: Sequence[Rollout], by: int) -> list[Rollout]:
    """Of prompts that stand so many rows further on."""
    return [dataclasses.replace(record, row=record.row + by) for record in records]
