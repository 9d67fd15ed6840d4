"""Stage 5: GRPO on tasks with rule rewards (section 2.3 of the report), in its synchronous form.

Each step: prompts -> a group of sampled answers each -> rewards -> advantages -> packed rows -> what other policies say
of them -> policy updates on minibatches of groups. Old log-probabilities are the sampler's, which equal the trainer's;
cfg.rollout.proximal has the trainer compute its own as well. The update is `rl_update`, the asynchronous form
`rl_async`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from glmv_jax import optim
from glmv_jax.inference.batches import EngineSampler
from glmv_jax.inference.sampler import Sampler
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.rl.batch import for_ranks, to_batch
from glmv_jax.rl.integrity import checked
from glmv_jax.rl.metrics import summary
from glmv_jax.rl.pipeline.samples import record_rows
from glmv_jax.rl.prompts import prompts
from glmv_jax.rl.rollout import Rollout
from glmv_jax.train.stages import rl_questions, rl_served
from glmv_jax.train.stages.rl_async import Asynchronous
from glmv_jax.train.stages.rl_choice import Choice
from glmv_jax.train.stages.rl_episodes import Episodes, Mixed
from glmv_jax.train.stages.rl_grading import Closing, Grading
from glmv_jax.train.stages.rl_others import Others
from glmv_jax.train.stages.rl_samples import Samples, add_trained
from glmv_jax.train.stages.rl_update import PolicyUpdate
from glmv_jax.train.stages.rl_workers import Roles
from glmv_jax.train.stages.vlm import begins
from glmv_jax.train.state import Placement, TrainState
from glmv_jax.typing import Batch, Params, UserError


class RL(PolicyUpdate):
    name = "rl"
    form = "chat"
    headline = "reward/mean"
    on_policy = True

    def __init__(self, cfg: ConfigDict) -> None:
        super().__init__(cfg)
        rl_served.check(cfg)
        self.roles = Roles(self)
        from glmv_jax.rl import tasks  # graders are imported where answers are graded, not with the trainer

        r = cfg.rollout
        self.episodes = Episodes(self) if r.get("environments", ()) else None
        if self.episodes:
            self.names = list(dict.fromkeys([*self.names, *self.episodes.parts]))
        self.verifiers = {} if cfg.get("rewards") else tasks.verifiers(cfg.data.weights)
        self.grading = Grading(self)
        self.questioner = dataclasses.replace(self.asker, thinking=bool(r.get("thinking", 0)))
        self.sampler = Sampler(self.model, rl_questions.sampling(self), r.group)
        self.limits = rl_questions.limits(self)
        self._drawing: EngineSampler | None = None
        shapes = jax.eval_shape(self.init_params, jax.random.key(0))
        self.trains_encoder = any(jax.tree.leaves(optim.trainable(optim.plan(cfg), shapes)["vision"]))
        self.rows = tuple(r.rows) if self.episodes is None or self.episodes.questions else (0,)  # of questions
        self.shape_buckets = len(self.rows)
        self.chosen = Choice(r, self.objective)
        self.samples = Samples(self)
        self.others, self.ranks = Others(self), 1  # devices that this process' rows are shared out to
        self._waiting: collections.deque = collections.deque()
        if (form := r.get("pipeline", "sync")) not in ("sync", "async"):
            raise UserError(f"rollout.pipeline={form!r} is not known; choose sync or async")
        self.beside = Asynchronous(self)
        if self.asynchronous:
            self.beside.check()

    def begin(self, placement: Placement, constants: Params, extra: Params, *, fresh: bool) -> Params:
        self.others.begin(placement)
        shared = rules_lib.batch_sharding(placement.mesh).shard_shape((placement.mesh.size,))[0]
        self.ranks = max(1, placement.mesh.size // shared // jax.process_count())
        return extra

    def train_data(self) -> Any:
        self.others.read()
        d, r = self.cfg.data, self.cfg.rollout
        if self.asynchronous:
            return self.beside.open()
        questions = functools.partial(
            prompts, builder=self.questioner, seed=self.data_seed, workers=d.workers, ahead=d.ahead,
            faults=self.cfg.faults or None,
        )  # fmt: skip
        self.grading.open()
        episodes, asked = self.episodes, self.episodes.questions if self.episodes else r.prompts
        if asked and (r.dynamic or rl_questions.curriculum(self.cfg)):
            data = rl_questions.Asking(self, asked)
        else:
            data = questions(episodes.weights if episodes else dict(d.weights), batch=asked) if asked else None
        if episodes is None:
            return self.samples.open(Closing(data, self.grading.close, self.samples.close))
        ends = episodes.close, self.grading.close, self.samples.close
        return self.samples.open(Closing(Mixed(data, episodes.groups), *ends))

    def batch_shapes(self) -> Iterable[Batch]:
        d = self.cfg.data
        sizes = dict(rows=(1,), tokens=d.tokens, patches=d.patches, names=self.names)
        row = checked(to_batch((), self.no_prompts(), np.zeros(0), **sizes)[0])
        for rows in (n + (self.cfg.rollout.episodes.rows if self.episodes else 0) for n in self.rows):
            shapes = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in row.items()}
            yield shapes | self.others.shapes(rows, d.tokens)

    def next_batch(self, data: Any, state: TrainState) -> tuple[Batch, dict[str, float]]:
        """One update's rows; a new set of rollouts when the last set's minibatches are used up.

        Rollouts that wait belong to the policy of at most cfg.rollout.minibatches - 1 updates ago; the ratio corrects.
        A resume in between samples them anew from the prompts that follow. ValueError when the rows are not those that
        were drawn (`integrity.checked`).
        """
        if self.asynchronous:
            rows, others, metrics = self.beside.next_batch(data, state)
        else:
            if not self._waiting:
                self._waiting.extend(self._rollouts(data, state))
            rows, others, metrics = self._waiting.popleft()
        return checked(rows) | others, metrics

    def drawing(self, params: Params) -> Sampler | EngineSampler:
        """Who draws the answers to a step's questions: a batch in lockstep or, with cfg.rollout.slots, the engine."""
        r = self.cfg.rollout
        if not r.get("slots", 0) or self.episodes:
            return self.sampler
        if self._drawing is None:
            sizes = r.slots, self.asker.max_tokens, self.longest
            how: Any = {"sampling": self.sampler.sampling, "drafts": rl_questions.drafts(self)}
            engine = self.engine(params, *sizes, **how)
            self._drawing = EngineSampler(engine, r.group)
        return self._drawing

    @property
    def asynchronous(self) -> bool:
        """Whether answers are drawn beside the training."""
        return self.cfg.rollout.get("pipeline", "sync") == "async"

    @property
    def longest(self) -> int:
        """Tokens of an answer to a question."""
        return max([self.cfg.rollout.max_new_tokens, *self.limits.values()])

    def no_prompts(self) -> Batch:
        """A batch of none, for those who ask what rows look like."""
        return {"patches": np.zeros((1, 1, self.asker.patcher.channels), np.uint8)}

    def _rollouts(self, data: Any, state: TrainState) -> Iterator[tuple[Batch, Batch, dict[str, float]]]:
        batch, step = next(data), int(state.step)
        played: list[Any] = []
        told: dict[str, float] = {}
        if self.episodes:
            played, told = self.episodes.play(batch["episodes"], state.params, step)
        asking = batch.get("asking") or rl_questions.Fixed(self, batch)
        found = asking.answers(state.params, step)
        parts = list(self.packed(found.records, found.batch)) if found.records else []
        if self.episodes:
            parts = self.episodes.behind(parts, played)
        parts = [(for_ranks(rows, self.ranks), left_out) for rows, left_out in parts]
        said = self.others.said_of([rows for rows, _ in parts], state.params)
        everyone = [*found.graded, *played]
        answers = record_rows(everyone, step)
        add_trained(answers, everyone, [rows for rows, _ in parts], said)
        self.samples.show([*found.records, *played], found.batch)
        data.keep([*self.samples.asked(answers, everyone), *answers])
        metrics = (summary(answers) or {self.headline: math.nan}) | found.metrics | told | self.grading.metrics()
        for (rows, left_out), others in zip(parts, said):
            yield rows, others, metrics | left_out

    def packed(self, records: Sequence[Rollout], batch: Batch) -> Iterator[tuple[Batch, dict[str, float]]]:
        """The rows of each minibatch, and how much found no room in them."""
        updates, advantages_NG = self.chosen(records, self.cfg.rollout.group)
        for of in updates:
            rows, left_out = to_batch(
                [records[n] for n in of], batch, advantages_NG.reshape(-1)[of], rows=self.rows,
                tokens=self.cfg.data.tokens, patches=self.cfg.data.patches, targets=self.cfg.data.targets,
                images=self.cfg.data.get("images", 0) or None, names=self.names, per="token",
            )  # fmt: skip
            yield rows, {"left_out": left_out / max(1, len(of))}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Samples are answers."""
        return super().counts(batch) | {"samples": int(begins(self._samples(batch)).sum())}

    def _samples(self, batch: Batch) -> np.ndarray:
        return np.asarray(batch["branches"])

    def flops(self, batch: Batch) -> float:
        """Of the update alone. The draft head is not run; a frozen encoder is not run backwards."""
        (B, T), P = batch["tokens"].shape, batch["frame"].shape[1]
        spared = 0.0 if self.trains_encoder else 2 * B * self.model.vision.flops(P)
        return 3 * dataclasses.replace(self.model, mtp=None).flops(B * T, T / 2, B, P) - spared
