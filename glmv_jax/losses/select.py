"""Loss only where something is learnt: logits are made for chosen tokens instead of for every position.

In instruction data few tokens of a row are answers, and a [B, T, V] array of logits is the largest thing a small model
makes. A packer bounds the tokens to be learnt in a row (`data.packing`), so their number J is a static shape. Chosen by
target, the main head and every depth of multi-token prediction meet at the same J tokens. Where rows are split over
devices (`parallel.context`), each device makes the logits of the targets among its own positions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.parallel import context


class Targets(NamedTuple):
    """J tokens to predict in each row; where N devices share it, as many for each as it may have.

    at_BJ: position of the token; tokens_BJ: its id; weight_BJ: its loss weight, 0 where a row has fewer than J;
    segments_BJ: its segment; cut: scalar, how many learnt tokens were left out (0 with a bounded packer).
    """

    at_BJ: jax.Array
    tokens_BJ: jax.Array
    weight_BJ: jax.Array
    segments_BJ: jax.Array
    cut: jax.Array


@jax.named_scope("loss")
def select(tokens_BT: jax.Array, segments_BT: jax.Array, loss_weight_BT: jax.Array, count: int) -> Targets:
    """The first `count` tokens of each row with a weight, in order."""
    weight_BT = loss_weight_BT.astype(jnp.float32)
    is_learnt_BT = weight_BT > 0
    is_chosen_BT = is_learnt_BT & (jnp.cumsum(is_learnt_BT, axis=1) <= count)
    at_BJ = context.chosen(is_chosen_BT, count)
    pick = lambda x_BT: jnp.take_along_axis(x_BT, at_BJ, axis=1)  # noqa: E731
    weight_BJ = pick(jnp.where(is_chosen_BT, weight_BT, 0.0))
    cut = (is_learnt_BT.sum() - is_chosen_BT.sum()).astype(jnp.float32)
    return Targets(at_BJ, pick(tokens_BT), weight_BJ, pick(segments_BT), cut)


def weights(targets: Targets, segments_BT: jax.Array, ahead: int) -> jax.Array:
    """[B, J]: the target's weight where there is a position `ahead` tokens before it in its segment, else 0."""
    from_BJ = targets.at_BJ - ahead
    inside_BJ = jnp.maximum(from_BJ, 0)
    same_BJ = (from_BJ >= 0) & (jnp.take_along_axis(segments_BT, inside_BJ, axis=1) == targets.segments_BJ)
    return targets.weight_BJ * (same_BJ & (targets.segments_BJ > 0))


@jax.named_scope("loss")
def predictors(
    targets: Targets, hidden_BTD: jax.Array, segments_BT: jax.Array, ahead: int
) -> tuple[jax.Array, jax.Array]:
    """What predicts each target from `ahead` tokens before it (1 for the main head, k + 1 for depth k of MTP).

    hidden_BTD: as the model returns it. Returns hidden_BJD and `weights`.
    """
    return context.before(hidden_BTD, targets.at_BJ, ahead), weights(targets, segments_BT, ahead)


def behind_image(segments_BT: jax.Array, is_image_BT: jax.Array) -> jax.Array:
    """[B, T] bool: an image stands before the position in its segment (segments are numbered along a row)."""
    last_image_BT = jax.lax.cummax(jnp.where(is_image_BT, segments_BT, 0), axis=1)
    return (last_image_BT == segments_BT) & (segments_BT > 0)
