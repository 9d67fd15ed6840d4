"""The loss per token whose gradient is the policy gradient, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.losses.policy.aggregation import Answers
from glmv_jax.losses.policy.basics import log_ratio

if TYPE_CHECKING:
    from glmv_jax.losses.policy.objective import Objective

GSPO_LIMIT = 10.0  # of the log ratio of a sequence


class Drawn(NamedTuple):
    """Tokens that a model drew, and their log-probabilities.

    logprob_BT: under pi, with a gradient. gap_BT: log(pi / pi_old), with that gradient. sampler_BT: under mu.
    advantage_BT; weight_BT: as of `policy_loss`; answers: which are one answer's.
    """

    logprob_BT: jax.Array
    gap_BT: jax.Array
    sampler_BT: jax.Array
    advantage_BT: jax.Array
    weight_BT: jax.Array
    answers: Answers


def clip(o: Objective, x: Drawn) -> tuple[jax.Array, jax.Array]:
    """PPO's loss, dual-clipped where o.dual_clip is set."""
    return _clipped(o, x.gap_BT, x.advantage_BT)


def gspo(o: Objective, x: Drawn) -> tuple[jax.Array, jax.Array]:
    """PPO's clip of the ratio of a whole answer, which every token of it gets a share of the gradient of."""
    own_BT = jax.lax.stop_gradient((x.weight_BT > 0).astype(x.gap_BT.dtype))
    mean_BT = x.answers.spread(x.answers.mean(jax.lax.stop_gradient(x.gap_BT), own_BT))
    gap_BT = x.logprob_BT - jax.lax.stop_gradient(x.logprob_BT) + mean_BT
    return _clipped(o, jnp.minimum(gap_BT, GSPO_LIMIT), x.advantage_BT)


def cispo(o: Objective, x: Drawn) -> tuple[jax.Array, jax.Array]:
    """The capped ratio is a weight; no token loses its gradient."""
    ratio_BT = jnp.exp(jax.lax.stop_gradient(x.gap_BT))
    return -jnp.minimum(ratio_BT, o.ratio_cap) * x.advantage_BT * x.logprob_BT, ratio_BT > o.ratio_cap


def double_sided(o: Objective, x: Drawn) -> tuple[jax.Array, jax.Array]:
    """The ratio to what drew the token is a weight, 0 outside of the trust region on either side."""
    ratio_BT = jnp.exp(jax.lax.stop_gradient(log_ratio(x.logprob_BT, x.sampler_BT)))
    inside_BT = (ratio_BT > 1.0 - o.clip_low) & (ratio_BT < 1.0 + o.clip_high)
    return -jnp.where(inside_BT, ratio_BT, 0.0) * x.advantage_BT * x.logprob_BT, ~inside_BT


def binary_tv(o: Objective, x: Drawn) -> tuple[jax.Array, jax.Array]:
    """A token is left out where its probability, not its ratio, has gone too far in the direction it is pushed."""
    return _near(o, x, _moved(x) * jnp.sign(x.advantage_BT))


def ipo(o: Objective, x: Drawn) -> tuple[jax.Array, jax.Array]:
    """A token is left out where its probability has gone too far, in whichever direction."""
    return _near(o, x, jnp.abs(_moved(x)))


def gmpo(o: Objective, x: Drawn) -> tuple[jax.Array, jax.Array]:
    """The geometric mean of an answer's ratios, of which each is clipped by itself, in its logarithm."""
    own_BT = (x.weight_BT > 0).astype(x.gap_BT.dtype)
    most_BT, least_BT = jnp.minimum(x.gap_BT, o.clip_high), jnp.maximum(x.gap_BT, -o.clip_low)
    held_BT = jnp.where(x.advantage_BT > 0, most_BT, least_BT)
    return -x.advantage_BT * jnp.exp(x.answers.spread(x.answers.mean(held_BT, own_BT))), held_BT != x.gap_BT


def sapo(o: Objective, x: Drawn) -> tuple[jax.Array, jax.Array]:
    """A sigmoid of the ratio in the place of a clip: the gradient fades and never ends; sooner where A < 0."""
    sharp_BT = jnp.where(x.advantage_BT > 0, o.tau_pos, o.tau_neg)
    soft_BT = jax.nn.sigmoid(sharp_BT * (jnp.exp(x.gap_BT) - 1.0)) * 4.0 / sharp_BT
    return -x.advantage_BT * soft_BT, jnp.zeros(x.gap_BT.shape, bool)


SURROGATES: dict[str, Callable[[Objective, Drawn], tuple[jax.Array, jax.Array]]] = {
    "clip": clip, "gspo": gspo, "cispo": cispo, "double_sided": double_sided, "binary_tv": binary_tv,
    "ipo": ipo, "gmpo": gmpo, "sapo": sapo,
}  # fmt: skip


def _clipped(o: Objective, gap_BT: jax.Array, advantage_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """max(-A r, -A clip(r)), and where the clip decided it."""
    ratio_BT = jnp.exp(gap_BT)
    free_BT = -advantage_BT * ratio_BT
    held_BT = -advantage_BT * jnp.clip(ratio_BT, 1.0 - o.clip_low, 1.0 + o.clip_high)
    loss_BT, clipped_BT = jnp.maximum(free_BT, held_BT), held_BT > free_BT
    if o.dual_clip:
        most_BT = -o.dual_clip * advantage_BT
        over_BT = (advantage_BT < 0) & (loss_BT > most_BT)
        loss_BT, clipped_BT = jnp.where(over_BT, most_BT, loss_BT), clipped_BT | over_BT
    return loss_BT, clipped_BT


def _moved(x: Drawn) -> jax.Array:
    """pi - mu."""
    return jax.lax.stop_gradient(jnp.exp(x.logprob_BT) - jnp.exp(x.sampler_BT))


def _near(o: Objective, x: Drawn, moved_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-A pi / mu where moved_BT is at most o.tv, and what holds the policy near what drew the token."""
    gap_BT, left_out_BT = log_ratio(x.logprob_BT, x.sampler_BT), moved_BT > o.tv
    loss_BT = jnp.where(left_out_BT, 0.0, -x.advantage_BT * jnp.exp(gap_BT))
    return loss_BT + o.penalty * jnp.square(gap_BT), left_out_BT
