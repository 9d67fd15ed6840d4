"""Histograms of oriented gradients, the texture target of MaskFeat (Wei et al., arXiv 2112.09133)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def hog_cells(images_BHW3: jax.Array, cell: int, bins: int) -> jax.Array:
    """[B, H / cell, W / cell, 3 * bins]: per colour, gradient magnitudes of a cell summed by unsigned orientation, then
    L2-normalised. Central differences, zero at the border, no interpolation between bins: scikit-image's definition
    with blocks of one cell."""
    dy = jnp.zeros_like(images_BHW3).at[:, 1:-1].set(images_BHW3[:, 2:] - images_BHW3[:, :-2])
    dx = jnp.zeros_like(images_BHW3).at[:, :, 1:-1].set(images_BHW3[:, :, 2:] - images_BHW3[:, :, :-2])
    magnitude = jnp.hypot(dy, dx)
    degrees = jnp.rad2deg(jnp.arctan2(dy, dx)) % 180.0
    which = jnp.clip((degrees / (180.0 / bins)).astype(jnp.int32), 0, bins - 1)
    votes = jax.nn.one_hot(which, bins) * magnitude[..., None]  # [B, H, W, 3, bins]
    B, H, W, _, _ = votes.shape
    hist = votes.reshape(B, H // cell, cell, W // cell, cell, 3, bins).mean((2, 4))
    hist = hist * jax.lax.rsqrt(jnp.sum(jnp.square(hist), axis=-1, keepdims=True) + 1e-10)
    return hist.reshape(B, H // cell, W // cell, 3 * bins)
