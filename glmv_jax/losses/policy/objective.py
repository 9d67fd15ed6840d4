"""The loss of one update, from its parts by name, and what is measured beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.losses.cross_entropy import divide
from glmv_jax.losses.policy.aggregation import AGGREGATIONS, Answers, aggregate, denominators
from glmv_jax.losses.policy.basics import choice, floating, log_ratio, settings
from glmv_jax.losses.policy.corrections import Correction, Mismatch, mismatch, off_policy
from glmv_jax.losses.policy.divergences import KL, Distil, kl, sampled_advantage
from glmv_jax.losses.policy.surrogates import SURROGATES, Drawn
from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: names and numbers of the page of this package. The defaults are GRPO with clip-higher.

    Raises: UserError for a name that is not known (it names the nearest), and for parts that do not go together.
    """

    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    ratio_cap: float = 5.0
    tv: float = 0.2
    penalty: float = 0.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    opsm: float = 0.0
    aggregation: str = "seq-mean-token-mean"
    max_length: int = 0
    kl: KL = KL()
    distil: Distil = Distil()
    correction: Correction = Correction()

    def __post_init__(self) -> None:
        choice("loss.surrogate", self.surrogate, SURROGATES)
        choice("loss.aggregation", self.aggregation, AGGREGATIONS)
        if self.surrogate in ("gspo", "gmpo") and self.aggregation != "seq-mean-token-mean":
            raise UserError(f"loss.surrogate={self.surrogate} has a ratio an answer; set "
                            "loss.aggregation=seq-mean-token-mean")  # fmt: skip
        if min(self.tau_pos, self.tau_neg) <= 0:
            raise UserError(f"loss.tau_pos={self.tau_pos} and loss.tau_neg={self.tau_neg} are sharpnesses, above 0")
        if self.aggregation == "seq-mean-token-sum-norm" and self.max_length < 1:
            raise UserError("loss.aggregation=seq-mean-token-sum-norm divides by a constant; set loss.max_length")
        if self.dual_clip and self.dual_clip <= 1:
            raise UserError(f"loss.dual_clip={self.dual_clip} would hold back every token; it is above 1, 0 for none")

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Objective:
        """From the config's group `loss`."""
        return settings(cls, group)


class Whole(NamedTuple):
    """Scalars of a whole step: of `denominators`; the sum of weights, which means are over; and the mean of the
    correction's weights, which they are divided by (1: they are not)."""

    denominator: jax.Array
    weight: jax.Array
    correction: jax.Array


def whole(
    o: Objective,
    weight_BT: jax.Array,
    answers: Answers | None = None,
    old_logprob_BT: jax.Array | None = None,
    proximal_BT: jax.Array | None = None,
) -> Whole:
    """Of a step that is to be taken in pieces; arguments as of `policy_loss`."""
    weight_BT = floating(weight_BT)
    total, mean = weight_BT.sum(), jnp.ones((), weight_BT.dtype)
    if o.correction.normalise and proximal_BT is not None and old_logprob_BT is not None:
        found = mismatch(o.correction, log_ratio(proximal_BT, old_logprob_BT), weight_BT, answers)
        mean = divide((found.factor_BT * weight_BT).sum(), total)
    return Whole(denominators(weight_BT, o.aggregation, answers), total, mean)


@jax.named_scope("policy")
def policy_loss(
    o: Objective,
    logprob_BT: jax.Array,
    old_logprob_BT: jax.Array,
    advantage: jax.Array,
    weight_BT: jax.Array,
    *,
    answers: Answers | None = None,
    proximal_BT: jax.Array | None = None,
    reference_BT: jax.Array | None = None,
    teacher_BT: jax.Array | None = None,
    distil_BT: jax.Array | None = None,
    entropy_BT: jax.Array | None = None,
    of: Whole | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Mismatch]:
    """The loss of one update on answers, its metrics, and the mismatch token by token.

    Args:
      logprob_BT: log-probability of each drawn token under the policy being trained.
      old_logprob_BT: the same under what drew it, mu.
      advantage: [B], one number a row, or [B, T].
      weight_BT: 1 on tokens that the model drew, 0 on prompts, images, what tools said and padding.
      answers: which tokens are one answer's; by default a row is one.
      proximal_BT: log-probability under the trainer before the first update, pi_old; None: it is taken to be mu.
      reference_BT: under the reference policy, for o.kl; teacher_BT: under the teacher, for o.distil "sampled".
      distil_BT: the divergence from the teacher, with a gradient (`reverse_kl_top`), for o.distil "top_k".
      entropy_BT: entropy per position, only for the metric.
      of: `whole` of the step that this is a piece of; by default this is all of it.

    Returns: loss; metrics, which add up over pieces (those in _max: the largest): means over tokens of ratio,
      clip_fraction, approx_kl (k3 of the step itself), mismatch_kl, mismatch_masked, mismatch_ratio and
      mismatch_square (of rho and its square); ratio_max, mismatch_gap_max; and entropy, reference_kl, distil when
      their inputs are given, opsm (the share of tokens that it drops) where it is set. See `with_effective_sizes`.
    Raises: UserError when a part of the objective lacks its input.
    """
    _check(o, proximal_BT, reference_BT, teacher_BT, distil_BT)
    logprob_BT, weight_BT = floating(logprob_BT), floating(weight_BT)
    answers = answers or Answers.rows(weight_BT.shape)
    of = of or whole(o, weight_BT, answers, old_logprob_BT, proximal_BT)
    sampler_BT = floating(old_logprob_BT)
    gap_BT = log_ratio(logprob_BT, sampler_BT if proximal_BT is None else proximal_BT)
    advantage_BT = floating(advantage[:, None] if advantage.ndim == 1 else advantage)
    said: dict[str, jax.Array] = {}
    if teacher_BT is not None:
        said["distil"] = -sampled_advantage(logprob_BT, teacher_BT)
        if o.distil.kind == "sampled":
            advantage_BT = advantage_BT - o.distil.factor * said["distil"]

    drawn = Drawn(logprob_BT, gap_BT, sampler_BT, advantage_BT, weight_BT, answers)
    token_BT, clipped_BT = SURROGATES[o.surrogate](o, drawn)
    off = mismatch(o.correction, log_ratio(logprob_BT if proximal_BT is None else proximal_BT, sampler_BT), weight_BT,
                   answers)  # fmt: skip
    token_BT = token_BT * divide(off.factor_BT, of.correction)
    if o.opsm:
        dropped_BT = off_policy(gap_BT, advantage_BT, weight_BT, answers) > o.opsm
        token_BT, said["opsm"] = jnp.where(dropped_BT, 0.0, token_BT), dropped_BT.astype(token_BT.dtype)
    if reference_BT is not None:
        said["reference_kl"] = kl(logprob_BT, reference_BT, o.kl.kind)
        token_BT = token_BT + o.kl.factor * said["reference_kl"] if o.kl.factor else token_BT
    if o.distil.kind == "top_k" and distil_BT is not None:
        said["distil"] = distil_BT
        token_BT = token_BT + o.distil.factor * distil_BT
    if entropy_BT is not None:
        said["entropy"] = entropy_BT
    ratio_BT = jnp.exp(gap_BT)
    said |= {
        "ratio": ratio_BT, "clip_fraction": clipped_BT, "approx_kl": ratio_BT - 1.0 - gap_BT, "mismatch_kl": off.kl_BT,
        "mismatch_masked": off.masked_BT, "mismatch_ratio": off.ratio_BT, "mismatch_square": jnp.square(off.ratio_BT),
    }  # fmt: skip
    mean = lambda x_BT: aggregate(jax.lax.stop_gradient(x_BT), weight_BT, "token-mean", denominator=of.weight)  # noqa: E731
    most = lambda x_BT: jax.lax.stop_gradient(jnp.where(weight_BT > 0, x_BT, 0.0).max())  # noqa: E731
    metrics = {name: mean(x_BT) for name, x_BT in said.items()}
    metrics |= {"ratio_max": most(ratio_BT), "mismatch_gap_max": most(jnp.abs(off.gap_BT))}
    loss = aggregate(token_BT, weight_BT, o.aggregation, answers=answers, denominator=of.denominator,
                     max_length=o.max_length)  # fmt: skip
    return loss, metrics, off


def _check(
    o: Objective, proximal_BT: jax.Array | None, reference_BT: jax.Array | None, teacher_BT: jax.Array | None,
    distil_BT: jax.Array | None,
) -> None:  # fmt: skip
    if o.kl.factor and reference_BT is None:
        raise UserError(f"loss.kl.factor={o.kl.factor} needs a reference policy; set reference.policy")
    if o.distil.kind == "sampled" and teacher_BT is None or o.distil.kind == "top_k" and distil_BT is None:
        raise UserError(f"loss.distil.kind={o.distil.kind} needs a teacher; set reference.teachers")
    if o.correction.weight != "none" and proximal_BT is None:
        raise UserError(
            f"loss.correction.weight={o.correction.weight} weighs the trainer's policy before the update against the "
            "sampler's, and only the latter is there (the ratio of the loss is already to that); set "
            "rollout.proximal=True"
        )
