"""The sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343): every image against every text of the global batch.

    L = -(1/B) sum_ij log sigmoid(y_ij l_ij),   l_ij = s z_i . w_j + b,   y = +1 where text j is of image i, else -1

Positives are B products of rows and are left to autodiff. The B x B negatives have three implementations, in
`losses.negatives`, that differ in memory and in what they send, not in the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glmv_jax.losses import negatives as negatives_lib
from glmv_jax.losses.cross_entropy import divide


@jax.named_scope("sigmoid")
def sigmoid_loss(
    image_BE: jax.Array,
    text_BNE: jax.Array,
    log_scale: jax.Array,
    bias: jax.Array,
    concept_B: jax.Array | None = None,
    *,
    impl: str = "dense",
    mesh: Mesh | None = None,
    chunk: int = 1024,
    wire: str = "bfloat16",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, averaged over the N texts that each image has.

    Args:
      image_BE: [B, E] of unit norm.
      text_BNE: [B, N, E], or [B, E] for one text an image, of unit norm; row i belongs to row i of the images.
      log_scale: scalar, the log of the temperature s (log 10 at the start).
      bias: scalar (-10 at the start, so that the many negatives cost nothing at first).
      concept_B: [B] int, optional: pairs off the diagonal that share a concept (one emoji under two names) are left
        out, since calling them negatives would be false.
      impl: "dense", "ring_bidir" or "allgather_chunked"; the last two need `mesh` and rows split over its data axes.
      chunk, wire: rows of logits at a time, and the dtype in which features travel and meet, of those two.

    Returns: the loss, and metrics: r1 (share of images that score their own text above every text of another concept in
      the batch), positive and negative (mean logits), scale, bias.
    Raises: UserError for an unknown `impl`, or when rows do not divide over the devices.
    """
    if text_BNE.ndim == 2:
        text_BNE = text_BNE[:, None]
    B, N, E = text_BNE.shape
    scale, bias = jnp.exp(log_scale.astype(jnp.float32)), bias.astype(jnp.float32)
    positive_BN = scale * jnp.einsum("be,bne->bn", image_BE, text_BNE, preferred_element_type=jnp.float32) + bias
    label_B = jnp.arange(B) if concept_B is None else concept_B

    run = negatives_lib.implementation(impl, mesh, chunk=chunk, wire=wire)
    others = run(image_BE, text_BNE.reshape(B * N, E), label_B, jnp.repeat(label_B, N), scale, bias)
    loss = (jax.nn.softplus(-positive_BN).sum() + others.softplus) / (B * N)
    metrics = {
        "r1": (positive_BN > others.highest_B[:, None]).mean(),
        "positive": positive_BN.mean(),
        "negative": divide(others.logits, others.pairs),
        "scale": scale,
        "bias": bias,
    }
    return loss, metrics
