"""Learning a teacher's features: cosine and smooth-L1 on features that are standardised channel by channel.

Teachers differ in scale by channel and among each other; standardising makes one loss weight mean the same for all of
them (UNIC, arXiv 2408.05088). Another way to the same end is `phi_s`. The weights of the terms are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax.losses.cross_entropy import divide
from glmv_jax.typing import Params, UserError


def init_stats(channels: int) -> Params:
    """Running statistics of a teacher: mean [C], var [C] and count [] (rows seen), float32."""
    return {
        "mean": jnp.zeros(channels, jnp.float32),
        "var": jnp.ones(channels, jnp.float32),
        "count": jnp.zeros((), jnp.float32),
    }


@jax.named_scope("teacher")
def update_stats(
    stats: Params, features: jax.Array, mask: jax.Array | None = None, momentum: float | None = None
) -> Params:
    """Statistics after seeing more features.

    Args:
      stats: of `init_stats`.
      features: [..., C].
      mask: [...] bool, rows that count (all by default).
      momentum: None: the exact mean and variance of everything seen (Chan et al.'s merging of two samples). A number m:
        exponential averages, m * old + (1 - m) * batch; the first batch is taken whole.

    Returns: new statistics; unchanged where the mask is empty. No gradient flows through them.
    """
    rows = jax.lax.stop_gradient(features.astype(jnp.float32)).reshape(-1, features.shape[-1])
    weight = jnp.ones(rows.shape[0]) if mask is None else mask.reshape(-1).astype(jnp.float32)
    seen = weight.sum()
    mean = divide((rows * weight[:, None]).sum(0), seen)
    var = divide((jnp.square(rows - mean) * weight[:, None]).sum(0), seen)

    count = stats["count"] + seen
    if momentum is None:
        share = divide(seen, count)
    else:
        share = jnp.where(stats["count"] > 0, 1.0 - momentum, 1.0)
    shift = mean - stats["mean"]
    # Variance of the mixture of both samples; with exponential weights leave out the term that a drift of means adds.
    between = share * (1 - share) * jnp.square(shift) if momentum is None else 0.0
    new = {
        "mean": stats["mean"] + share * shift,
        "var": (1 - share) * stats["var"] + share * var + between,
        "count": count,
    }
    return jax.tree.map(lambda old, fresh: jnp.where(seen > 0, fresh, old), stats, new)


@jax.named_scope("teacher")
def standardise(features: jax.Array, stats: Params, eps: float = 1e-3) -> jax.Array:
    """(features - mean) / sqrt(var + eps^2) per channel, [..., C] float32; a channel that never varies becomes 0."""
    return (features.astype(jnp.float32) - stats["mean"]) * jax.lax.rsqrt(stats["var"] + eps**2)


@jax.named_scope("loss")
def distill_loss(
    predicted: Mapping[str, jax.Array],
    target: Mapping[str, jax.Array],
    mask_BP: jax.Array,
    weights: Mapping[str, float] | None = None,
    *,
    cosine: float = 1.0,
    smooth_l1: float = 1.0,
    mse: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum over teachers of weight * mean over tokens of [cosine (1 - cos) + mean over channels of distances].

    Args:
      predicted: teacher name -> [B, P, C], the student's head for that teacher.
      target: teacher name -> [B, P, C], standardised features; they get no gradient.
      mask_BP: [B, P] bool, tokens that count: the masked ones (MIM), or every real one.
      weights: teacher name -> factor; 1 where absent.
      cosine, smooth_l1, mse: factors of the terms. smooth_l1 is x^2/2 below 1 and |x| - 1/2 above, mse is x^2.

    Returns: the loss, and for each teacher metrics `<name>/loss`, `<name>/cos` (mean cosine), `<name>/smooth_l1`,
      `<name>/mse`.
    Raises: ValueError when the names differ: a teacher without a head is an error, not a loss of 0; UserError when no
      term counts.
    """
    if not (cosine or smooth_l1 or mse):
        raise UserError("the loss of stage 1 has no term; give loss.cosine, loss.smooth_l1 or loss.mse a factor")
    weights = dict(weights or {})
    if set(predicted) != set(target) or not set(weights) <= set(target):
        raise ValueError(f"heads {sorted(predicted)}, teachers {sorted(target)} and weights {sorted(weights)} differ")
    tokens = mask_BP.sum().astype(jnp.float32)
    total, metrics = jnp.zeros((), jnp.float32), dict[str, jax.Array]()
    for name in sorted(predicted):
        compared = _compare(predicted[name], target[name])
        cos, l1, square = (divide((x_BP * mask_BP).sum(), tokens) for x_BP in compared)
        loss = cosine * (1.0 - cos) * (tokens > 0) + smooth_l1 * l1 + mse * square
        metrics |= {f"{name}/loss": loss, f"{name}/cos": cos, f"{name}/smooth_l1": l1, f"{name}/mse": square}
        total = total + weights.get(name, 1.0) * loss
    return total, metrics


def _compare(predicted_BPC: Any, target_BPC: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosine, smooth L1 and squared error of each token, [B, P]."""
    x, y = predicted_BPC.astype(jnp.float32), jax.lax.stop_gradient(target_BPC.astype(jnp.float32))
    # rsqrt of (sum + tiny) keeps the gradient finite at a prediction of exactly 0.
    unit = lambda v: v * jax.lax.rsqrt(jnp.square(v).sum(-1, keepdims=True) + 1e-12)  # noqa: E731
    gap = jnp.abs(x - y)
    huber = jnp.where(gap < 1.0, 0.5 * jnp.square(gap), gap - 0.5)
    return (unit(x) * unit(y)).sum(-1), huber.mean(-1), jnp.square(gap).mean(-1)
