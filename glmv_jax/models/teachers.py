"""What a student learns from in stage 1: images in, one feature vector a patch out.

A teacher gets the same uint8 crop as the student and does its own normalisation, so teachers may differ in patch size,
mean and std. Its features come in the student's merge-block order. Two that need no download:
`tower` (a CogViT trained with text, semantic) and `hog` (gradient histograms, texture: MaskFeat, arXiv 2112.09133).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax.models import cogvit
from glmv_jax.typing import Params, VisionInput

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """channels: width of its features; apply(params, images [B, S, S, 3] uint8) -> [B, P, channels] float32."""

    name: str
    about: str
    channels: int
    params: Params
    apply: Callable[[Params, jax.Array], jax.Array]


def tower(name: str, cfg: cogvit.CogViTConfig, params: Params, about: str) -> Teacher:
    """The patch features of a CogViT, frozen."""

    def features(params: Params, images_BHW3: jax.Array) -> jax.Array:
        return cogvit.apply(cfg, params, rows(images_BHW3, cfg.patch, cfg.temporal_patch)).astype(jnp.float32)

    return Teacher(name, about, cfg.width, params, features)


def hog(name: str, patch: int, bins: int = 9) -> Teacher:
    """Histograms of oriented gradients of the 2x2 cells of a patch, three colours: 4 * bins * 3 channels."""
    about = f"HOG, {bins} orientations, cells of {patch // 2} px"

    def features(params: Params, images_BHW3: jax.Array) -> jax.Array:
        cells = hog_cells(images_BHW3.astype(jnp.float32) / 255.0, patch // 2, bins)  # [B, y, x, 3 * bins]
        return merge_order(join(cells, 2))

    return Teacher(name, about, 4 * bins * 3, {}, features)


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


def join(grid_BYXC: jax.Array, n: int) -> jax.Array:
    """n x n neighbours of a grid side by side: [B, Y / n, X / n, n * n * C]."""
    B, Y, X, C = grid_BYXC.shape
    blocks = grid_BYXC.reshape(B, Y // n, n, X // n, n, C).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(B, Y // n, X // n, n * n * C)


def merge_order(grid_BYXC: jax.Array) -> jax.Array:
    """[B, Y, X, C] -> [B, Y * X, C] with the four patches of each 2x2 merge block in a row."""
    B, Y, X, C = grid_BYXC.shape
    return join(grid_BYXC, 2).reshape(B, Y * X, C)


def rows(images_BHW3: jax.Array, patch: int, temporal_patch: int) -> VisionInput:
    """uint8 images of one size as CogViT's input: CLIP normalisation, a still frame repeated, layout (C, t, y, x)."""
    B, H, W, _ = images_BHW3.shape
    pixels = (images_BHW3.astype(jnp.float32) / 255.0 - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)
    Y, X = H // patch, W // patch
    patches: Any = pixels.reshape(B, Y, patch, X, patch, 3).transpose(0, 1, 3, 5, 2, 4)  # [B, Y, X, 3, patch, patch]
    patches = jnp.repeat(patches[:, :, :, :, None], temporal_patch, axis=4).reshape(B, Y, X, -1)
    yx = jnp.stack(jnp.meshgrid(jnp.arange(Y), jnp.arange(X), indexing="ij"), -1)
    yx = jnp.broadcast_to(merge_order(yx[None]), (B, Y * X, 2))
    return VisionInput(merge_order(patches), yx, jnp.ones((B, Y * X), jnp.int32))
