"""Next-token cross-entropy, and what is measured beside it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class CrossEntropy(NamedTuple):
    """loss: scalar; nll_BT: -log p(target) per position, unweighted; weight: the sum of weights it was divided by."""

    loss: jax.Array
    nll_BT: jax.Array
    weight: jax.Array


def next_targets(
    tokens_BT: jax.Array, loss_weight_BT: jax.Array, segments_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """What each position has to predict: the token after it, with that token's weight.

    Args:
      tokens_BT: [B, T] int.
      loss_weight_BT: [B, T], the weight of predicting the token AT a position.
      segments_BT: [B, T] int, 0 = padding; a token is never predicted from another segment. None: one segment a row.

    Returns: targets_BT int and weights_BT float32; the last column has weight 0.
    """
    targets_BT = shift_left(tokens_BT, 1)
    weight_BT = shift_left(loss_weight_BT.astype(jnp.float32), 1)
    if segments_BT is not None:
        weight_BT = weight_BT * ((segments_BT == shift_left(segments_BT, 1)) & (segments_BT > 0))
    return targets_BT, weight_BT


def cross_entropy(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    denominator: jax.Array | None = None,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """sum(weight * (nll + z_loss * logsumexp(logits)^2)) / denominator, in float32.

    Args:
      logits_BTV: [B, T, V]; position t predicts targets_BT[:, t].
      targets_BT: [B, T] int in [0, V); anything where the weight is 0.
      weight_BT: [B, T] float.
      denominator: scalar; by default the sum of the weights. A batch of weight 0 has loss 0.
      z_loss: pulls the normaliser towards 1 (PaLM, arXiv 2204.02311, section 5: 1e-4).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    weight_BT = weight_BT.astype(jnp.float32)
    normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    nll_BT = normaliser_BT - _gather(logits_BTV, targets_BT)
    weight = weight_BT.sum() if denominator is None else jnp.asarray(denominator, jnp.float32)
    total = (weight_BT * (nll_BT + z_loss * jnp.square(normaliser_BT))).sum()
    return CrossEntropy(divide(total, weight), nll_BT, weight)


def accuracy(logits_BTV: jax.Array, targets_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """The weighted share of positions whose most probable token is the target; 0 where nothing has weight."""
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return divide((weight_BT * correct_BT).sum(), weight_BT.sum())


@jax.named_scope("loss")
def per_source(
    value_BT: jax.Array, weight_BT: jax.Array, source_BT: jax.Array, sources: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums and weights by source: two float32 arrays [sources].

    `source_BT` holds indices into the list of source names, -1 for padding (counted nowhere). Sums, not means, so that
    they add up over steps and machines.
    """
    index = jnp.where(source_BT < 0, sources, source_BT).reshape(-1)
    add = lambda x: jax.ops.segment_sum(x.reshape(-1).astype(jnp.float32), index, sources + 1)[:sources]  # noqa: E731
    return add(value_BT * weight_BT), add(weight_BT)


def logprobs(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """log p(target) per position, [B, T] float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    return _gather(logits_BTV, targets_BT) - jax.nn.logsumexp(logits_BTV, axis=-1)


def entropy(logits_BTV: jax.Array) -> jax.Array:
    """Entropy of the next-token distribution per position, in nats, [B, T] float32."""
    logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    return -(jnp.exp(logp_BTV) * logp_BTV).sum(-1)


def shift_left(x_BT: jax.Array, by: int) -> jax.Array:
    """x[:, t + by] at position t, and 0 where that is past the end."""
    by = min(by, x_BT.shape[1])
    return jnp.pad(x_BT[:, by:], ((0, 0), (0, by)))


def divide(total: jax.Array, by: jax.Array) -> jax.Array:
    """total / by, and 0 (with a gradient of 0) where by is 0."""
    return jnp.where(by > 0, total / jnp.where(by > 0, by, 1.0), 0.0)


def _gather(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
