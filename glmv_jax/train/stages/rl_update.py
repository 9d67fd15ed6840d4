"""The update of stage 5: log-probabilities of what was drawn, and the loss of `losses.policy` on them.

By default clip-higher 0.2 / 0.28, no KL and no entropy term (GLM-V, section 5.3); `losses.policy` has all else that
cfg.loss can be. Old log-probabilities are those of whoever drew the tokens, which equal the trainer's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from glmv_jax.losses import policy
from glmv_jax.losses.chunked import CHUNK, head_logprobs, head_map
from glmv_jax.losses.cross_entropy import per_source
from glmv_jax.losses.select import Targets, behind_image, predictors, select, weights
from glmv_jax.models import vlm
from glmv_jax.train.stages import experts, rl_questions
from glmv_jax.train.stages.vlm import VLMStage, inputs
from glmv_jax.typing import Batch, Params, TokenInput

NOT_OF_THE_OBJECTIVE = ("aux", "chunk", "mtp")  # keys of cfg.loss
IMAGES = ("without image", "with image")  # what the mismatch is told by, beside the sources


class PolicyUpdate(VLMStage):
    """A stage that learns from answers that were drawn. objective: what cfg.loss says."""

    def __init__(self, cfg: ConfigDict) -> None:
        super().__init__(cfg)
        loss = {name: value for name, value in cfg.loss.items() if name not in NOT_OF_THE_OBJECTIVE}
        self.objective = policy.Objective.of(loss)

    @property
    def data_seed(self) -> int:
        """Processes ask different questions."""
        return super().data_seed + rl_questions.OTHERS * jax.process_index()

    @property
    def head_settings(self) -> dict[str, Any]:
        return {"temperature": self.cfg.rollout.temperature, "chunk": self.cfg.loss.get("chunk", CHUNK)}

    def drawn(self, tokens: TokenInput) -> Targets:
        return select(tokens.tokens, tokens.segments, tokens.loss_weight, self.cfg.data.targets)

    def learnt(self, params: Params, batch: Batch) -> tuple:
        """(targets, hidden states that predict them [B, J, D], their weights [B, J], what blocks say)."""
        vision, tokens = inputs(batch)
        out = vlm.apply(self.model, params, vision, tokens)
        targets = self.drawn(tokens)
        return targets, *predictors(targets, out.hidden, tokens.segments, 1), out.aux

    def of_targets(self, params: Params, targets: Targets, hidden_BJD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probability and entropy at each target, [B, J]."""
        return head_logprobs(hidden_BJD, vlm.head(self.model, params), targets.tokens_BJ, **self.head_settings)

    def whole(self, batch: Batch, pieces: int = 1) -> Params:
        tokens = inputs(batch)[1]
        targets = self.drawn(tokens)
        weight_BJ = weights(targets, tokens.segments, 1)
        old_BJ, proximal_BJ = (at_targets(batch, name, targets) for name in ("old_logprob", "proximal"))
        found = policy.whole(self.objective, weight_BJ, _answers(batch, targets), old_BJ, proximal_BJ)
        image_N = per_source(weight_BJ, weight_BJ, _with_image(batch, targets), len(IMAGES))[1]
        return super().whole(batch, pieces) | {"policy": found, "image_N": image_N}

    def loss(
        self, params: Params, constants: Params, extra: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
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

    def _distance(self, params: Params, hidden_BJD: jax.Array, at: Callable[[str], Any]) -> jax.Array | None:
        """[B, J]: divergence from the teacher over its likeliest tokens; None where the loss has none."""
        ids_BJK, top_BJK = at("teacher_ids"), at("teacher_top")
        if ids_BJK is None:
            return None

        def distance(logp_SCV: jax.Array, ids_SCK: jax.Array, top_SCK: jax.Array) -> jax.Array:
            return policy.reverse_kl_top(jnp.take_along_axis(logp_SCV, ids_SCK, axis=-1), top_SCK)

        return head_map(distance, hidden_BJD, vlm.head(self.model, params), ids_BJK, top_BJK, **self.head_settings)

    def finished(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return policy.with_effective_sizes(metrics)


def at_targets(batch: Batch, name: str, targets: Targets) -> Any:
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
