"""What drew the tokens is not quite the trainer's policy: factors of the token loss, and how large the mismatch is."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.losses.policy.aggregation import Answers
from glmv_jax.losses.policy.basics import LOG_LIMIT, choice
from glmv_jax.typing import UserError

LEVELS = ("none", "token", "sequence", "geometric")
REJECT = ("none", "k1", "k2", "k3")
OVER = ("token", "mean", "sum", "max")


@dataclasses.dataclass(frozen=True)
class Correction:
    """weight: of what the importance weight is (`LEVELS`); outside: "clamp" or "zero" where it leaves [low, high].

    normalise: weights are divided by their mean over the step. veto: an answer with a token of a smaller ratio is
    dropped, 0: none is. reject: what is dropped where that estimate, over a token or an answer, exceeds `limit`.
    """

    weight: str = "none"
    outside: str = "clamp"
    low: float = 0.0
    high: float = 2.0
    normalise: bool = False
    veto: float = 0.0
    reject: str = "none"
    over: str = "token"
    limit: float = 0.1

    def __post_init__(self) -> None:
        choice("loss.correction.weight", self.weight, LEVELS)
        choice("loss.correction.outside", self.outside, ("clamp", "zero"))
        choice("loss.correction.reject", self.reject, REJECT)
        choice("loss.correction.over", self.over, OVER)
        if not 0 <= self.low < self.high:
            raise UserError(f"loss.correction: low={self.low} and high={self.high} bound a ratio; 0 <= low < high")


class Mismatch(NamedTuple):
    """gap_BT: log rho. ratio_BT: rho. kl_BT: rho - 1 - log rho. factor_BT: of the token loss. None has a gradient."""

    gap_BT: jax.Array
    ratio_BT: jax.Array
    kl_BT: jax.Array
    factor_BT: jax.Array

    @property
    def masked_BT(self) -> jax.Array:
        """Where the correction leaves nothing of a token."""
        return self.factor_BT == 0


def mismatch(c: Correction, gap_BT: jax.Array, weight_BT: jax.Array, answers: Answers | None = None) -> Mismatch:
    """What `c` makes of log rho; weight_BT: 0 where no token is. `normalise` is left to who knows the whole step."""
    gap_BT = jax.lax.stop_gradient(jnp.where(weight_BT > 0, gap_BT, 0.0))
    own_BT = (weight_BT > 0).astype(gap_BT.dtype)
    answers = answers or Answers.rows(gap_BT.shape)
    ratio_BT = jnp.exp(gap_BT)
    factor_BT = _weights(c, gap_BT, own_BT, answers) * _kept(c, gap_BT, own_BT, answers)
    return Mismatch(gap_BT, ratio_BT, jnp.expm1(gap_BT) - gap_BT, factor_BT)


def off_policy(gap_BT: jax.Array, advantage_BT: jax.Array, weight_BT: jax.Array, answers: Answers) -> jax.Array:
    """[B, T]: mean over the answer of log(pi_old / pi) at tokens that lower an answer's probability, -inf elsewhere.

    Answers that were wrong, and that the policy would hardly give any more, say little of it and move it far. No
    gradient. gap_BT: log(pi / pi_old).
    """
    own_BT = (weight_BT > 0).astype(gap_BT.dtype)
    left_BT = -answers.spread(answers.mean(jax.lax.stop_gradient(gap_BT), own_BT))
    return jnp.where(advantage_BT < 0, left_BT, -jnp.inf)


def _weights(c: Correction, gap_BT: jax.Array, own_BT: jax.Array, answers: Answers) -> jax.Array:
    if c.weight == "none":
        return jnp.ones_like(gap_BT)
    if c.weight == "sequence":
        gap_BT = answers.spread(answers.sum(gap_BT * own_BT))
    elif c.weight == "geometric":
        gap_BT = answers.spread(answers.mean(gap_BT, own_BT))
    ratio_BT = jnp.exp(jnp.clip(gap_BT, -LOG_LIMIT, LOG_LIMIT))
    if c.outside == "clamp":
        return jnp.clip(ratio_BT, c.low, c.high)
    return jnp.where((ratio_BT >= c.low) & (ratio_BT <= c.high), ratio_BT, 0.0)


def _kept(c: Correction, gap_BT: jax.Array, own_BT: jax.Array, answers: Answers) -> jax.Array:
    """1 on tokens that neither the veto nor the rejection drops."""
    kept_BT = jnp.ones_like(gap_BT)
    if c.veto:
        hit_BT = (jnp.exp(gap_BT) < c.veto) * own_BT
        kept_BT = kept_BT * (answers.spread(answers.sum(hit_BT)) == 0)
    if c.reject == "none":
        return kept_BT
    k_BT = {"k1": gap_BT, "k2": jnp.square(gap_BT) / 2, "k3": jnp.expm1(gap_BT) - gap_BT}[c.reject]
    if c.over == "mean":
        k_BT = answers.spread(answers.mean(k_BT, own_BT))
    elif c.over == "sum":
        k_BT = answers.spread(answers.sum(k_BT * own_BT))
    elif c.over == "max":
        k_BT = answers.spread(answers.max(jnp.abs(k_BT) * own_BT))
    return kept_BT * (jnp.abs(k_BT) <= c.limit)
