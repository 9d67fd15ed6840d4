"""Stage 5: GRPO on tasks with rule rewards (section 2.3 of the report), in its synchronous form.

Each step: prompts -> a group of sampled answers each -> rewards -> advantages -> packed rows -> policy updates on
minibatches of groups. Clip-higher 0.2 / 0.28, no KL and no entropy term (GLM-V, section 5.3). Old log-probabilities are
the sampler's, which equal the trainer's.
"""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from glmv_jax import optim
from glmv_jax.inference.sampler import Sampler, Sampling
from glmv_jax.losses import policy
from glmv_jax.losses.chunked import CHUNK, head_logprobs
from glmv_jax.losses.cross_entropy import divide
from glmv_jax.losses.select import predictors, select
from glmv_jax.models import vlm
from glmv_jax.rl.batch import to_batch
from glmv_jax.rl.metrics import by_source
from glmv_jax.rl.prompts import prompts
from glmv_jax.rl.rollout import rollout
from glmv_jax.train.stages import experts
from glmv_jax.train.stages.vlm import VLMStage, inputs


class RL(VLMStage):
    name = "rl"
    form = "chat"
    headline = "reward/mean"
    on_policy = True

    def __init__(self, cfg: ConfigDict) -> None:
        super().__init__(cfg)
        from glmv_jax.rl import tasks  # graders are imported where answers are graded, not with the trainer

        r = cfg.rollout
        self.verifiers = tasks.verifiers(self.names)
        sampling = Sampling.chat(self.tokenizer, r.max_new_tokens, temperature=r.temperature, top_p=r.top_p)
        self.sampler = Sampler(self.model, sampling, r.group)
        shapes = jax.eval_shape(self.init_params, jax.random.key(0))
        self.trains_encoder = any(jax.tree.leaves(optim.trainable(optim.plan(cfg), shapes)["vision"]))
        self.rows = tuple(r.rows)
        self.shape_buckets = len(self.rows)
        self._waiting: collections.deque = collections.deque()

    def train_data(self):
        d, r = self.cfg.data, self.cfg.rollout
        return prompts(
            dict(d.weights), self.asker, batch=r.prompts, seed=self.data_seed, workers=d.workers, ahead=d.ahead,
            faults=self.cfg.faults or None,
        )  # fmt: skip

    def batch_shapes(self):
        d = self.cfg.data
        prompts = {"patches": np.zeros((1, 1, self.asker.patcher.channels), np.uint8)}
        for rows in self.rows:
            sizes = dict(rows=(rows,), tokens=d.tokens, patches=d.patches, names=self.names)
            empty, _ = to_batch((), prompts, np.zeros(0), **sizes)
            yield {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in empty.items()}

    def next_batch(self, data, state):
        """One update's rows; a new set of rollouts when the last set's minibatches are used up.

        Rollouts that wait belong to the policy of at most cfg.rollout.minibatches - 1 updates ago; the ratio corrects.
        A resume in between samples them anew from the prompts that follow.
        """
        if not self._waiting:
            self._waiting.extend(self._rollouts(next(data), state))
        return self._waiting.popleft()

    def _rollouts(self, batch, state):
        r = self.cfg.rollout
        key = jax.random.fold_in(jax.random.key(self.cfg.seed), int(state.step))
        records = rollout(self.sampler, state.params, batch, key, self.tokenizer, self.verifiers)
        rewards_NG = np.array([x.grade.reward for x in records]).reshape(-1, r.group)
        advantages_NG = np.asarray(policy.group_advantages(rewards_NG, r.advantage))
        metrics = by_source(records)
        # Groups whose rewards are all equal have no gradient: packing them would only cost time (DAPO, section 3.2).
        # Those whose rewards differ most come first and are not the ones left out when the rows are full. A group goes
        # whole to one minibatch, so that rollouts of a prompt share its image in the packed rows.
        differs_N = rewards_NG.max(1) > rewards_NG.min(1)  # the deviation of equal numbers may be 1e-17
        differing = [g for g in np.argsort(-rewards_NG.std(1), kind="stable") if differs_N[g]]
        for groups in (differing[i :: r.minibatches] for i in range(r.minibatches)):
            part = [records[g * r.group + i] for g in groups for i in range(r.group)]
            rows, left_out = to_batch(
                part, batch, advantages_NG[groups].reshape(-1), rows=self.rows, tokens=self.cfg.data.tokens,
                patches=self.cfg.data.patches, targets=self.cfg.data.targets, names=self.names, per=r.per,
            )  # fmt: skip
            yield rows, metrics | {"left_out": left_out / max(1, len(part))}

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

    def loss(self, params, constants, extra, batch, key):
        vision, tokens = inputs(batch)
        out = vlm.apply(self.model, params, vision, tokens)
        targets = select(tokens.tokens, tokens.segments, tokens.loss_weight, self.cfg.data.targets)
        hidden_BJD, weight_BJ = predictors(targets, out.hidden, tokens.segments, 1)
        logprob_BJ, entropy_BJ = head_logprobs(
            hidden_BJD, vlm.head(self.model, params), targets.tokens_BJ, temperature=self.cfg.rollout.temperature,
            chunk=self.cfg.loss.get("chunk", CHUNK),
        )  # fmt: skip
        at = lambda x_BT: jnp.take_along_axis(x_BT, targets.at_BJ, axis=1)  # noqa: E731
        weight = (batch.get("whole") or self.whole(batch))["weight_H"][0]
        loss, metrics = policy.policy_loss(
            logprob_BJ, at(batch["old_logprob"]), at(batch["advantage"]), weight_BJ,
            how="token-mean", clip_low=self.cfg.loss.clip_low, clip_high=self.cfg.loss.clip_high,
            entropy_BT=entropy_BJ, denominator=weight,
        )  # fmt: skip
        share = divide(weight_BJ.sum(), weight)  # 1, but of a piece of a batch
        metrics = {name: x if name.endswith("_max") else share * x for name, x in metrics.items()}
        extra = experts.counted(extra, experts.by_path(out.aux, (), shared=True))
        return loss, (metrics | {"cut": targets.cut}, extra)
