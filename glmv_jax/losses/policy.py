"""Policy-gradient pieces for reinforcement learning with groups of rollouts.

`mask_BT` is 1 where the model chose the token and 0 on prompts, images and tool output. The aggregations by sequence
take one row for one rollout; rows that pack several use "token-mean", with weights in place of ones if need be.
Sources: GRPO, DeepSeekMath (arXiv 2402.03300); clip-higher and token mean, DAPO (arXiv 2503.14476); no division by the
standard deviation or the length, Dr.GRPO (arXiv 2503.20783); k3, J. Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glmv_jax.losses.cross_entropy import divide

ADVANTAGES = ("grpo", "dr_grpo")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
_LOG_LIMIT = 20.0  # beyond e^20 a ratio only overflows


def group_advantages(reward_NG: jax.Array, kind: str = "grpo", eps: float = 1e-6) -> jax.Array:
    """Advantages of G rollouts of each of N prompts, relative to their group.

    grpo: (R - mean) / (std + eps), std with ddof 1. dr_grpo: R - mean. A group whose rewards are all equal gets exactly
    0 (a rounded mean divided by eps would not).

    Args: reward_NG: [N, G] float.
    Returns: [N, G] float32.
    Raises: ValueError when G < 2: a rollout alone has nothing to be compared with.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage {kind!r} is not one of {', '.join(ADVANTAGES)}")
    reward_NG = jnp.asarray(reward_NG, jnp.float32)
    if reward_NG.ndim != 2 or reward_NG.shape[1] < 2:
        raise ValueError(f"rewards {reward_NG.shape} are not [N, G >= 2]: raise the group size")
    centred_NG = reward_NG - reward_NG.mean(1, keepdims=True)
    if kind == "grpo":
        centred_NG = centred_NG / (reward_NG.std(1, ddof=1, keepdims=True) + eps)
    equal_N1 = reward_NG.max(1, keepdims=True) == reward_NG.min(1, keepdims=True)
    return jnp.where(equal_N1, 0.0, centred_NG)


def log_ratio(logprob_BT: jax.Array, old_logprob_BT: jax.Array) -> jax.Array:
    """log(pi / pi_old), clamped to +-20; the old policy gets no gradient."""
    gap_BT = logprob_BT.astype(jnp.float32) - jax.lax.stop_gradient(old_logprob_BT.astype(jnp.float32))
    return jnp.clip(gap_BT, -_LOG_LIMIT, _LOG_LIMIT)


def clipped_surrogate(
    log_ratio_BT: jax.Array, advantage_BT: jax.Array, clip_low: float = 0.2, clip_high: float = 0.28
) -> tuple[jax.Array, jax.Array]:
    """PPO's loss per token, max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and where the clip decided it.

    The upper bound is wider (clip-higher), which lets improbable good tokens grow.

    Args: log_ratio_BT: of `log_ratio`; advantage_BT: [B, T] or [B, 1].
    Returns: loss_BT float32, clipped_BT bool.
    """
    ratio_BT = jnp.exp(log_ratio_BT)
    free_BT = -advantage_BT * ratio_BT
    held_BT = -advantage_BT * jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.maximum(free_BT, held_BT), held_BT > free_BT


def k3(logprob_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
    """Estimate of KL(pi || reference) per token: exp(-d) + d - 1, d = log pi - log reference; unbiased, never < 0."""
    d_BT = log_ratio(logprob_BT, reference_BT)
    return jnp.expm1(-d_BT) + d_BT


def denominators(mask_BT: jax.Array, how: str) -> jax.Array:
    """What `aggregate` divides by: tokens ("token-mean") or rows that have a token (the others).

    Take it over the whole step and hand it to every micro-batch; then their losses sum to that of the step.
    """
    _check(how)
    mask_BT = mask_BT.astype(jnp.float32)
    return mask_BT.sum() if how == "token-mean" else (mask_BT.sum(1) > 0).sum().astype(jnp.float32)


def aggregate(
    value_BT: jax.Array,
    mask_BT: jax.Array,
    how: str = "seq-mean-token-mean",
    *,
    denominator: jax.Array | None = None,
    max_length: int | None = None,
) -> jax.Array:
    """A scalar from values per token.

    token-mean: every token weighs the same. seq-mean-token-mean: every rollout does. seq-mean-token-sum-norm: the sum
    of a rollout's tokens over the constant `max_length` (Dr.GRPO: long answers are not discounted). Rows without a
    token count nowhere.

    Args: denominator: of `denominators`, by default this batch's; max_length: for the last form only.
    """
    _check(how)
    mask_BT = mask_BT.astype(jnp.float32)
    denominator = denominators(mask_BT, how) if denominator is None else denominator
    sum_B = jnp.where(mask_BT > 0, value_BT * mask_BT, 0.0).sum(1)
    if how == "seq-mean-token-mean":
        sum_B = divide(sum_B, mask_BT.sum(1))
    elif how == "seq-mean-token-sum-norm":
        if not max_length:
            raise ValueError("seq-mean-token-sum-norm needs max_length, the constant the sums are divided by")
        sum_B = sum_B / max_length
    return divide(sum_B.sum(), denominator)


@jax.named_scope("policy")
def policy_loss(
    logprob_BT: jax.Array,
    old_logprob_BT: jax.Array,
    advantage: jax.Array,
    mask_BT: jax.Array,
    *,
    how: str = "seq-mean-token-mean",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl: float = 0.0,
    reference_BT: jax.Array | None = None,
    entropy_BT: jax.Array | None = None,
    denominator: jax.Array | None = None,
    max_length: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one update on rollouts, and its metrics.

    Args:
      logprob_BT: log-probability of each chosen token under the policy being trained.
      old_logprob_BT: the same under the policy that made the rollouts.
      advantage: [B], one number a rollout, or [B, T].
      mask_BT: 1 on tokens that the model chose; rows packed from several rollouts may hold weights instead, under
        how="token-mean" (`rl.batch.to_batch` sets them so that the mean is the one asked for).
      kl: factor of the k3 divergence from `reference_BT` (0: the reference is only monitored, if given).
      entropy_BT: entropy per position, only for the metric.
      Others as in `clipped_surrogate` and `aggregate`.

    Returns: loss, and metrics averaged over tokens: ratio, ratio_max, clip_fraction, approx_kl (k3 of the step itself),
      entropy and reference_kl when their inputs are given.
    Raises: ValueError when kl > 0 without a reference.
    """
    if kl and reference_BT is None:
        raise ValueError(f"kl={kl} needs reference_BT, the log-probabilities of the reference policy")
    advantage_BT = advantage[:, None] if advantage.ndim == 1 else advantage
    gap_BT = log_ratio(logprob_BT, old_logprob_BT)
    token_BT, clipped_BT = clipped_surrogate(gap_BT, advantage_BT, clip_low, clip_high)
    mean = lambda x_BT: aggregate(jax.lax.stop_gradient(x_BT), mask_BT, "token-mean")  # noqa: E731
    ratio_BT = jnp.exp(gap_BT)
    metrics = {
        "ratio": mean(ratio_BT),
        "ratio_max": jax.lax.stop_gradient(jnp.where(mask_BT > 0, ratio_BT, 0.0).max()),
        "clip_fraction": mean(clipped_BT.astype(jnp.float32)),
        "approx_kl": mean(ratio_BT - 1.0 - gap_BT),
    }
    if reference_BT is not None:
        reference_kl_BT = k3(logprob_BT, reference_BT)
        metrics["reference_kl"] = mean(reference_kl_BT)
        token_BT = token_BT + kl * reference_kl_BT if kl else token_BT
    if entropy_BT is not None:
        metrics["entropy"] = mean(entropy_BT)
    return aggregate(token_BT, mask_BT, how, denominator=denominator, max_length=max_length), metrics


def _check(how: str) -> None:
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation {how!r} is not one of {', '.join(AGGREGATIONS)}")
