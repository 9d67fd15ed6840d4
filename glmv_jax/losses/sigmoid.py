"""The sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343), dense: every image against every text of the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glmv_jax.losses.cross_entropy import divide


def sigmoid_loss(
    image_BE: jax.Array,
    text_BE: jax.Array,
    log_scale: jax.Array,
    bias: jax.Array,
    concept_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-(1/B) sum_ij log sigmoid(y_ij l_ij), l = exp(log_scale) image . text + bias, y = +1 on the diagonal, else -1.

    Computed as (1/B) [sum_ij softplus(l_ij) - sum_i l_ii], which is the same and needs no matrix of labels.

    Args:
      image_BE, text_BE: [B, E] of unit norm; row i of one belongs to row i of the other.
      log_scale: scalar, the log of the temperature (log 10 at the start).
      bias: scalar (-10 at the start, so that the many negatives cost nothing at first).
      concept_B: [B] int, optional: pairs off the diagonal that share a concept (one emoji under two names) are left
        out, since calling them negatives would be false.

    Returns: the loss, and metrics: r1_image_to_text and r1_text_to_image (share of rows whose own partner scores
      highest within the batch; partners of the same concept count), positive and negative (mean logits), scale, bias.
    """
    logits_BB = jnp.matmul(image_BE, text_BE.T, preferred_element_type=jnp.float32)
    logits_BB = logits_BB * jnp.exp(log_scale.astype(jnp.float32)) + bias.astype(jnp.float32)
    B = logits_BB.shape[0]
    own_BB = jnp.eye(B, dtype=bool)
    alike_BB = own_BB if concept_B is None else concept_B[:, None] == concept_B[None, :]
    counted_BB = own_BB | ~alike_BB

    diagonal_B = jnp.diagonal(logits_BB)
    loss = (jnp.where(counted_BB, jax.nn.softplus(logits_BB), 0.0).sum() - diagonal_B.sum()) / B

    def hit(axis):
        return jnp.take_along_axis(alike_BB, jnp.argmax(logits_BB, axis, keepdims=True), axis).mean()

    negatives_BB = ~alike_BB
    metrics = {
        "r1_image_to_text": hit(1),
        "r1_text_to_image": hit(0),
        "positive": diagonal_B.mean(),
        "negative": divide((logits_BB * negatives_BB).sum(), negatives_BB.sum().astype(jnp.float32)),
        "scale": jnp.exp(log_scale.astype(jnp.float32)),
        "bias": bias.astype(jnp.float32),
    }
    return loss, metrics
