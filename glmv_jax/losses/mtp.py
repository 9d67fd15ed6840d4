"""Multi-token prediction: the loss of the heads that look further ahead.

Head k = 1, 2, ... at position i has seen tokens 0..i through the main model and token i + k through its own embedding,
and predicts token i + k + 1 (DeepSeek-V3, arXiv 2412.19437, section 2.2; GLM-5V-Turbo, section 2.2, for images).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.losses.cross_entropy import accuracy, cross_entropy, divide, shift_left


class MTPLoss(NamedTuple):
    """loss: scalar, the mean over depths; loss_K, accuracy_K, agreement_K, weight_K: per depth, [K].

    accuracy: the draft's most probable token is the target. agreement: it is also what the main model would have said,
    which is when greedy speculative decoding accepts it (nan when the main logits were not given).
    """

    loss: jax.Array
    loss_K: jax.Array
    accuracy_K: jax.Array
    agreement_K: jax.Array
    weight_K: jax.Array


def mtp_targets(
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    loss_weight_BT: jax.Array,
    is_image_BT: jax.Array,
    depth: int,
) -> tuple[jax.Array, jax.Array]:
    """Targets and weights of head `depth` at every position.

    The target of i is token i + depth + 1. It has its own loss weight, and 0 unless positions i, i + depth and
    i + depth + 1 exist in one segment (packing) and the target is text: an image placeholder is never predicted. A
    position inside an image whose target is text counts.

    Args:
      tokens_BT, segments_BT (0 = padding): [B, T] int.
      loss_weight_BT: [B, T], the weight of predicting the token AT a position.
      is_image_BT: [B, T] bool, True at image placeholders.
      depth: k >= 1.

    Returns: targets_BT int, weight_BT float32.
    """
    if depth < 1:
        raise ValueError(f"depth={depth}: the first prediction head has depth 1")
    ahead = depth + 1
    same = (segments_BT > 0) & (segments_BT == shift_left(segments_BT, depth))
    same &= segments_BT == shift_left(segments_BT, ahead)
    text = ~shift_left(is_image_BT, ahead)
    weight_BT = jnp.maximum(shift_left(loss_weight_BT.astype(jnp.float32), ahead), 0.0)
    return shift_left(tokens_BT, ahead), weight_BT * (same & text)


def mtp_loss(
    logits_KBTV: Sequence[jax.Array],
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    loss_weight_BT: jax.Array,
    is_image_BT: jax.Array,
    *,
    main_logits_BTV: jax.Array | None = None,
    denominators_K: jax.Array | None = None,
) -> MTPLoss:
    """The mean over depths of the cross-entropy of each head; the caller multiplies it by its lambda.

    Args:
      logits_KBTV: one [B, T, V] array a depth, the first of depth 1.
      main_logits_BTV: the main model's [B, T, V], for `agreement`; they get no gradient.
      denominators_K: [K] sums of weights of the whole step; by default those of this batch.
      Others as in `mtp_targets`.

    Raises: ValueError without any depth: a missing head is an error, not a loss of 0.
    """
    if not len(logits_KBTV):
        raise ValueError("mtp_loss got no logits; a model without prediction heads has no such loss")
    rows = []
    for k, logits_BTV in enumerate(logits_KBTV, start=1):
        targets_BT, weight_BT = mtp_targets(tokens_BT, segments_BT, loss_weight_BT, is_image_BT, k)
        denominator = None if denominators_K is None else denominators_K[k - 1]
        ce = cross_entropy(logits_BTV, targets_BT, weight_BT, denominator=denominator)
        if main_logits_BTV is None:
            agreement = jnp.float32(jnp.nan)
        else:  # the main model predicts token i + k + 1 at position i + k
            main_BT = shift_left(jnp.argmax(main_logits_BTV, axis=-1), k)
            agreement = divide((weight_BT * (jnp.argmax(logits_BTV, axis=-1) == main_BT)).sum(), weight_BT.sum())
        rows.append((ce.loss, accuracy(logits_BTV, targets_BT, weight_BT), agreement, weight_BT.sum()))
    loss_K, accuracy_K, agreement_K, weight_K = (jnp.stack(column) for column in zip(*rows, strict=True))
    return MTPLoss(loss_K.mean(), loss_K, accuracy_K, agreement_K, weight_K)
