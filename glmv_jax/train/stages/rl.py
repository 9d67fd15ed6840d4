"""Stage 5: GRPO on tasks with rule rewards (section 2.3 of the report), in its synchronous form.

Each step: prompts -> a group of sampled answers each -> rewards -> advantages -> packed rows -> what other policies say
of them -> policy updates on minibatches of groups. By default clip-higher 0.2 / 0.28, no KL and no entropy term (GLM-V,
section 5.3); `losses.policy` has all else that cfg.loss can be. Old log-probabilities are the sampler's, which equal
the trainer's; cfg.rollout.proximal has the trainer compute its own as well.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from glmv_jax import optim
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front
from glmv_jax.inference.sampler import Sampler
from glmv_jax.inference.settings import Settings as EngineSettings
from glmv_jax.losses import policy
from glmv_jax.losses.chunked import CHUNK, head_logprobs, head_map
from glmv_jax.losses.cross_entropy import per_source
from glmv_jax.losses.select import Targets, behind_image, predictors, select, weights
from glmv_jax.models import vlm
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.rl.batch import for_ranks, to_batch
from glmv_jax.rl.curriculum import useful
from glmv_jax.rl.integrity import checked
from glmv_jax.rl.metrics import summary
from glmv_jax.rl.pipeline import Scheduler, Settings
from glmv_jax.rl.pipeline.background import Background, Parts
from glmv_jax.rl.pipeline.driver import Taken
from glmv_jax.rl.pipeline.episodes import is_episode
from glmv_jax.rl.pipeline.episodes import records as of_episodes
from glmv_jax.rl.pipeline.local import Rows, SamplerEngine, rollouts
from glmv_jax.rl.pipeline.samples import record_rows
from glmv_jax.rl.pipeline.slots import SlotEngine
from glmv_jax.rl.prompts import prompts
from glmv_jax.rl.rollout import Long
from glmv_jax.rl.tiers import Tiers
from glmv_jax.train.stages import experts, rl_questions
from glmv_jax.train.stages.rl_choice import Choice
from glmv_jax.train.stages.rl_episodes import Episodes, Mixed
from glmv_jax.train.stages.rl_grading import Closing, Grading
from glmv_jax.train.stages.rl_others import Others
from glmv_jax.train.stages.rl_samples import Samples, add_trained
from glmv_jax.train.stages.vlm import VLMStage, inputs
from glmv_jax.typing import Batch, Params, TokenInput, UserError

NOT_OF_THE_OBJECTIVE = ("aux", "chunk", "mtp")  # keys of cfg.loss
IMAGES = ("without image", "with image")  # what the mismatch is told by, beside the sources


class RL(VLMStage):
    name = "rl"
    form = "chat"
    headline = "reward/mean"
    on_policy = True

    def __init__(self, cfg: ConfigDict) -> None:
        super().__init__(cfg)
        from glmv_jax.rl import tasks  # graders are imported where answers are graded, not with the trainer

        r = cfg.rollout
        self.episodes = Episodes(self) if r.get("environments", ()) else None
        if self.episodes:
            self.names = list(dict.fromkeys([*self.names, *self.episodes.parts]))
        self.verifiers = {} if cfg.get("rewards") else tasks.verifiers(cfg.data.weights)
        self.grading = Grading(self)
        self.questioner = dataclasses.replace(self.asker, thinking=bool(r.get("thinking", 0)))
        self.sampler = Sampler(self.model, rl_questions.sampling(self), r.group)
        self.long = self._long()
        shapes = jax.eval_shape(self.init_params, jax.random.key(0))
        self.trains_encoder = any(jax.tree.leaves(optim.trainable(optim.plan(cfg), shapes)["vision"]))
        self.rows = tuple(r.rows) if self.episodes is None or self.episodes.questions else (0,)  # of questions
        self.shape_buckets = len(self.rows)
        loss = {name: value for name, value in cfg.loss.items() if name not in NOT_OF_THE_OBJECTIVE}
        self.objective = policy.Objective.of(loss)
        self.chosen = Choice(r, self.objective)
        self.samples = Samples(self)
        self.others, self.ranks = Others(self), 1  # devices that this process' rows are shared out to
        self._waiting: collections.deque = collections.deque()
        if r.get("pipeline", "sync") not in ("sync", "async"):
            raise UserError(f"rollout.pipeline={r.pipeline!r} is not known; choose sync or async")
        if r.get("pipeline", "sync") == "async" and r.minibatches != 1:
            raise UserError(f"rollout.minibatches={r.minibatches}: with rollout.pipeline='async' every batch of groups "
                            "is one update; set minibatches=1, and fewer prompts")  # fmt: skip

    def _long(self) -> Long | None:
        """The kinds of cfg.rollout.long, whose answers are written apart."""
        r = self.cfg.rollout
        if not r.get("long") or not r.long.kinds:
            return None
        if unknown := set(r.long.kinds) - set(self.cfg.data.weights):
            raise UserError(f"rollout.long.kinds: {min(unknown)!r} is no source of data.weights; leave it out")
        if r.get("pipeline", "sync") != "sync":
            raise UserError("rollout.long is of rollout.pipeline='sync'; with 'async', rollout.slots=N writes answers "
                            "of all lengths side by side")  # fmt: skip
        if r.overlong.buffer:
            raise UserError("rollout.overlong.buffer counts from one length of all answers, and rollout.long gives "
                            "some kinds another; set one of the two")  # fmt: skip
        if r.long.max_new_tokens < r.max_new_tokens:
            raise UserError(f"rollout.long.max_new_tokens={r.long.max_new_tokens} is below rollout.max_new_tokens="
                            f"{r.max_new_tokens}; exchange them, or leave rollout.long.kinds empty")  # fmt: skip
        sampling = dataclasses.replace(self.sampler.sampling, max_new_tokens=r.long.max_new_tokens)
        return Long(Sampler(self.model, sampling, r.group), frozenset(r.long.kinds), r.long.prompts)

    def begin(self, placement, constants, extra, *, fresh):
        self.others.begin(placement)
        shared = rules_lib.batch_sharding(placement.mesh).shard_shape((placement.mesh.size,))[0]
        self.ranks = max(1, placement.mesh.size // shared // jax.process_count())
        return extra

    def train_data(self):
        self.others.read()
        d, r = self.cfg.data, self.cfg.rollout
        if r.get("pipeline", "sync") == "async":
            return self._pipeline()
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

    def batch_shapes(self):
        d = self.cfg.data
        for rows in (n + (self.cfg.rollout.episodes.rows if self.episodes else 0) for n in self.rows):
            sizes = dict(rows=(rows,), tokens=d.tokens, patches=d.patches, names=self.names)
            empty, _ = to_batch((), self._no_prompts(), np.zeros(0), **sizes)
            shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in checked(empty).items()}
            yield shapes | self.others.shapes(rows, d.tokens)

    def next_batch(self, data, state):
        """One update's rows; a new set of rollouts when the last set's minibatches are used up.

        Rollouts that wait belong to the policy of at most cfg.rollout.minibatches - 1 updates ago; the ratio corrects.
        A resume in between samples them anew from the prompts that follow. ValueError when the rows are not those that
        were drawn (`integrity.checked`).
        """
        if isinstance(data, Background):
            # A copy, as the engine draws with it while the step that follows takes the memory of the state.
            taken, drawn = data.exchange(jax.tree.map(jnp.copy, state.params), int(state.step))
            rows, left_out, records = taken.batch
            rows = for_ranks(rows, self.ranks)
            others = self.others.said_of([rows], state.params)[0]
            answers = [row for row in drawn if row["kind"] == "sample"]
            # As the records are: questions, then episodes.
            answers.sort(key=lambda row: isinstance(row["key"], dict))
            add_trained(answers, records, [rows], [others])
            if self.samples.folder is not None:
                data.keep([*self.samples.asked(answers, records), *drawn])
            return checked(rows) | others, summary(drawn) | left_out | self._told(taken, drawn) | self.grading.metrics()
        if not self._waiting:
            self._waiting.extend(self._rollouts(data, state))
        rows, others, metrics = self._waiting.popleft()
        return checked(rows) | others, metrics

    def _pipeline(self) -> Background:
        """Rollouts, rewards and rows made beside the training, in threads (`rl.pipeline`)."""
        r = self.cfg.rollout
        settings = Settings(
            r.prompts, r.group, staleness=r.staleness, late=r.late, in_flight=r.in_flight, seconds=r.seconds or None
        )
        rows = rl_questions.rows(self) if self.episodes is None or self.episodes.weights else None
        self._rows, self._expansion = rows, rl_questions.expansion(self.cfg)
        self.grading.open()
        if self.episodes:
            engine = self.episodes.engine(rows)
        elif r.get("slots", 0):
            engine = SlotEngine(self._front, rows, self.cfg.seed, self.tokenizer)
        else:
            engine = SamplerEngine(self.sampler, rows, r.prompts, jax.random.key(self.cfg.seed), self.tokenizer)

        async def build(step, groups):
            del step
            return await asyncio.to_thread(self._batch, groups, rows)

        def scheduler(note):
            prompts = self.episodes.prompts(rows) if self.episodes else rows
            self._scheduler = Scheduler(prompts, settings, note, keep=useful if r.dynamic else None)
            return self._scheduler

        def close():
            self.grading.close()
            self.samples.close()

        parts = Parts(scheduler, engine, self.grading.answers(rows), build, close)
        return Background(parts, self.samples.run)

    def _batch(self, groups, rows: Rows | None):
        """The rows of the pipeline's groups, what is told of them, and their records."""
        asked = [group for group in groups if not is_episode(group.prompt)]
        records, batch = rollouts(asked, rows) if asked else ([], self._no_prompts())
        if self.episodes is None:
            self.samples.show(records, batch)
            return *next(iter(self._packed(records, batch))), records
        parts = list(self._packed(records, batch)) if self.episodes.questions else []
        played = [group for group in groups if is_episode(group.prompt)]
        episodes = of_episodes(played)
        ((both, told),) = _side_by_side(parts, self.episodes.rows(episodes))
        self.samples.show([*records, *episodes], batch)
        return both, told | self.episodes.told(played), [*records, *episodes]

    def _no_prompts(self) -> Batch:
        return {"patches": np.zeros((1, 1, self.asker.patcher.channels), np.uint8)}

    def _told(self, taken: Taken, drawn: Sequence[dict[str, Any]]) -> dict[str, float]:
        """What the curriculum has learnt, and how much more is asked than a batch holds: groups that teach nothing are
        replaced in any case, but where a batch waits for none (late) as many more begin at once."""
        scheduler, most = self._scheduler, self._scheduler.settings.most_in_flight
        metrics = self._rows.metrics() if isinstance(self._rows, Tiers) else {}
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

    def _front(self, params, version: int) -> Front:
        """The inference engine in a thread of its own."""
        r, longest, patches = self.cfg.rollout, self.asker.max_tokens, self.asker.max_patches
        sizes = EngineSettings(
            slots=r.slots, length=longest + r.max_new_tokens, chunks=(min(64, longest), longest), patches=(patches,),
            pictures=r.prompts * patches // 4, queue=4 * r.slots,
        )  # fmt: skip
        engine = Engine(self.model, params, self.sampler.sampling, sizes, version=version)
        engine.warm()
        return Front(engine)

    def _rollouts(self, data, state):
        batch, step, played, told = next(data), int(state.step), [], {}
        if self.episodes:
            played, told = self.episodes.play(batch["episodes"], state.params, step)
        asking = batch.get("asking") or rl_questions.Fixed(self, batch)
        found = asking.answers(state.params, step)
        parts = list(self._packed(found.records, found.batch)) if found.records else []
        if self.episodes:
            parts = _side_by_side(parts, self.episodes.rows(played))
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

    def _packed(self, records, batch):
        """The rows of each minibatch, and how much found no room in them."""
        updates, advantages_NG = self.chosen(records, self.cfg.rollout.group)
        for of in updates:
            rows, left_out = to_batch(
                [records[n] for n in of], batch, advantages_NG.reshape(-1)[of], rows=self.rows,
                tokens=self.cfg.data.tokens, patches=self.cfg.data.patches, targets=self.cfg.data.targets,
                images=self.cfg.data.get("images", 0) or None, names=self.names, per="token",
            )  # fmt: skip
            yield rows, {"left_out": left_out / max(1, len(of))}

    def counts(self, batch):
        """Samples are answers."""
        branches = np.asarray(batch["branches"])
        starts = (branches > 0) & (branches != np.pad(branches, ((0, 0), (1, 0)))[:, :-1])
        return super().counts(batch) | {"samples": int(starts.sum())}

    def flops(self, batch):
        """Of the update alone. The draft head is not run; a frozen encoder is not run backwards."""
        (B, T), P = batch["tokens"].shape, batch["frame"].shape[1]
        spared = 0.0 if self.trains_encoder else 2 * B * self.model.vision.flops(P)
        return 3 * dataclasses.replace(self.model, mtp=None).flops(B * T, T / 2, B, P) - spared

    # --- the update ---------------------------------------------------------------------------------------------------

    @property
    def head_settings(self) -> dict[str, float]:
        return {"temperature": self.cfg.rollout.temperature, "chunk": self.cfg.loss.get("chunk", CHUNK)}

    def drawn(self, tokens: TokenInput) -> Targets:
        return select(tokens.tokens, tokens.segments, tokens.loss_weight, self.cfg.data.targets)

    def learnt(self, params: Params, batch: Batch):
        """(targets, hidden states that predict them [B, J, D], their weights [B, J], what blocks say)."""
        vision, tokens = inputs(batch)
        out = vlm.apply(self.model, params, vision, tokens)
        targets = self.drawn(tokens)
        return targets, *predictors(targets, out.hidden, tokens.segments, 1), out.aux

    def of_targets(self, params: Params, targets: Targets, hidden_BJD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probability and entropy at each target, [B, J]."""
        return head_logprobs(hidden_BJD, vlm.head(self.model, params), targets.tokens_BJ, **self.head_settings)

    def whole(self, batch, pieces=1):
        tokens = inputs(batch)[1]
        targets = self.drawn(tokens)
        weight_BJ = weights(targets, tokens.segments, 1)
        old_BJ, proximal_BJ = (at_targets(batch, name, targets) for name in ("old_logprob", "proximal"))
        found = policy.whole(self.objective, weight_BJ, _answers(batch, targets), old_BJ, proximal_BJ)
        image_N = per_source(weight_BJ, weight_BJ, _with_image(batch, targets), len(IMAGES))[1]
        return super().whole(batch, pieces) | {"policy": found, "image_N": image_N}

    def loss(self, params, constants, extra, batch, key):
        whole = batch.get("whole") or self.whole(batch)
        targets, hidden_BJD, weight_BJ, aux = self.learnt(params, batch)
        logprob_BJ, entropy_BJ = self.of_targets(params, targets, hidden_BJD)
        at = functools.partial(at_targets, batch, targets=targets)
        loss, metrics, off = policy.policy_loss(
            self.objective, logprob_BJ, at("old_logprob"), at("advantage"), weight_BJ,
            answers=_answers(batch, targets), proximal_BT=at("proximal"), reference_BT=at("reference"),
            teacher_BT=at("teacher"), distil_BT=self._distance(params, hidden_BJD, at), entropy_BT=entropy_BJ,
            of=whole["policy"],
        )  # fmt: skip
        metrics |= policy.mismatch_by_source(off, weight_BJ, at("source"), whole["source_N"], self.names)
        seen_BJ = _with_image(batch, targets)
        metrics |= policy.mismatch_by_source(off, weight_BJ, seen_BJ, whole["image_N"], IMAGES)
        extra = experts.counted(extra, experts.by_path(aux, (), shared=True))
        return loss, (metrics | {"cut": targets.cut}, extra)

    def _distance(self, params: Params, hidden_BJD: jax.Array, at) -> jax.Array | None:
        """[B, J]: divergence from the teacher over its likeliest tokens; None where the loss has none."""
        ids_BJK, top_BJK = at("teacher_ids"), at("teacher_top")
        if ids_BJK is None:
            return None

        def distance(logp_SCV, ids_SCK, top_SCK):
            return policy.reverse_kl_top(jnp.take_along_axis(logp_SCV, ids_SCK, axis=-1), top_SCK)

        return head_map(distance, hidden_BJD, vlm.head(self.model, params), ids_BJK, top_BJK, **self.head_settings)

    def finished(self, metrics):
        return policy.with_effective_sizes(metrics)


def _side_by_side(parts, played) -> list[tuple[Batch, dict[str, float]]]:
    """For each update the rows of its questions, where there are any, and those of its episodes behind them."""
    found = []
    for (rows, left_out), (episodes, without_room) in zip(parts or [({}, {})] * len(played), played):
        both = {name: np.concatenate([rows[name], x]) if rows else x for name, x in episodes.items()}
        found.append((both, left_out | {"left_out/episodes": without_room}))
    return found


def at_targets(batch: Batch, name: str, targets: Targets) -> jax.Array | None:
    """An array [B, T, ...] of the batch at the targets, [B, J, ...]; None where it is not there."""
    if name not in batch:
        return None
    x_BT = batch[name]
    at_BJ = targets.at_BJ.reshape(*targets.at_BJ.shape, *[1] * (x_BT.ndim - 2))
    return jnp.take_along_axis(x_BT, at_BJ, axis=1)


def _with_image(batch: Batch, targets: Targets) -> jax.Array:
    """[B, J]: the place in IMAGES of each target, by whether an image stands before it in its text."""
    seen_BT = behind_image(batch["segments"], batch["image_row"] >= 0)
    return jnp.take_along_axis(seen_BT.astype(jnp.int32), targets.at_BJ, axis=1)


def _answers(batch: Batch, targets: Targets) -> policy.Answers:
    return policy.Answers.of(batch["segments"], batch.get("branches")).at(targets.at_BJ)
