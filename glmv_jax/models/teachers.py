"""What a student learns from in stage 1: images in, one feature vector a patch out.

A teacher gets the same uint8 crop as the student, sizes and normalises it as it was trained, and gives its features in
the student's grid and merge-block order. Public ones are `siglip` and `dinov3` (see `interop` for their checkpoints);
two need no download: `tower` (a CogViT trained with text, semantic) and `hog` (texture).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax.models import api, cogvit
from glmv_jax.models import dinov3 as dinov3_lib
from glmv_jax.models import siglip as siglip_lib
from glmv_jax.models.hog import hog_cells
from glmv_jax.typing import Axes, Params, UserError, VisionInput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """apply(params, images [B, S, S, 3] uint8) -> [B, P, channels] float32.

    channels: width of its features. params, axes: its parameters and their logical axes. flops: of one image.
    """

    name: str
    about: str
    channels: int
    params: Params
    axes: Axes
    flops: float
    apply: Callable[[Params, jax.Array], jax.Array]


def tower(name: str, cfg: cogvit.CogViTConfig, params: Params, about: str, *, grid: int) -> Teacher:
    """The patch features of a CogViT, frozen; its grid is the student's."""

    def features(params: Params, images_BHW3: jax.Array) -> jax.Array:
        return cogvit.apply(cfg, params, rows(images_BHW3, cfg.patch)).astype(jnp.float32)

    return Teacher(name, about, cfg.width, params, api.logical_axes(cfg), cfg.flops(grid**2), features)


def hog(name: str, patch: int, bins: int = 9) -> Teacher:
    """Histograms of oriented gradients of the 2x2 cells of a patch, three colours: 4 * bins * 3 channels."""
    about = f"HOG, {bins} orientations, cells of {patch // 2} px"

    def features(params: Params, images_BHW3: jax.Array) -> jax.Array:
        cells = hog_cells(images_BHW3.astype(jnp.float32) / 255.0, patch // 2, bins)  # [B, y, x, 3 * bins]
        return merge_order(join(cells, 2))

    return Teacher(name, about, 4 * bins * 3, {}, {}, 0.0, features)


def siglip(
    name: str, cfg: siglip_lib.SiglipVisionConfig, params: Params, about: str, *, size: int, grid: int
) -> Teacher:
    """SigLIP or SigLIP 2: its patch features after the last norm. `params` of the image tower; see `_public`."""
    cfg = dataclasses.replace(cfg, head=False)
    params = {key: value for key, value in params.items() if key != "head"}
    features = lambda p, vision: siglip_lib.embed_image(cfg, p, vision)[0]  # noqa: E731
    return _public(name, about, cfg, params, features, size, grid, HALF, HALF)


def dinov3(name: str, cfg: dinov3_lib.DINOv3Config, params: Params, about: str, *, size: int, grid: int) -> Teacher:
    """DINOv3: its patch features after the last norm; see `_public`."""
    features = lambda p, vision: dinov3_lib.apply(cfg, p, vision)[0]  # noqa: E731
    return _public(name, about, cfg, params, features, size, grid, IMAGENET_MEAN, IMAGENET_STD)


def _public(
    name: str, about: str, cfg: Any, params: Params, features: Callable, size: int, grid: int, mean: tuple, std: tuple
) -> Teacher:
    """A ViT of patches (y, x, channel).

    size: side in pixels of the image it sees; the crop is resized to it. 0: so many that its grid is the student's
      (DINOv3/16 sees 256 px beside CogViT/14's 224). Where the grids differ its feature map is resized.
    grid: side of the student's grid, in patches.
    """
    side, p = size or grid * cfg.patch, cfg.patch
    if side % p:
        raise UserError(f"teachers.{name}.size={side} is no multiple of its patch {p}; try {-(-side // p) * p}")
    own = side // p

    def apply(params: Params, images_BHW3: jax.Array) -> jax.Array:
        B = images_BHW3.shape[0]
        pixels = _resized(images_BHW3.astype(jnp.float32) / 255.0, side)
        pixels = (pixels - jnp.array(mean)) / jnp.array(std)
        patches = pixels.reshape(B, own, p, own, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, own * own, -1)
        yx = jnp.stack(jnp.meshgrid(jnp.arange(own), jnp.arange(own), indexing="ij"), -1).reshape(1, -1, 2)
        vision = VisionInput(patches, jnp.broadcast_to(yx, (B, own * own, 2)), jnp.ones((B, own * own), jnp.int32))
        found = features(params, vision).astype(jnp.float32).reshape(B, own, own, -1)
        return merge_order(_resized(found, grid))

    about = f"{about}, at {side} px"
    return Teacher(name, about, cfg.width, params, api.logical_axes(cfg), cfg.flops(own**2), apply)


def _resized(x_BYXC: jax.Array, side: int) -> jax.Array:
    """Bilinear and antialiased; what has the side already stays as it is."""
    B, Y, X, C = x_BYXC.shape
    return x_BYXC if Y == X == side else jax.image.resize(x_BYXC, (B, side, side, C), "bilinear")


def join(grid_BYXC: jax.Array, n: int) -> jax.Array:
    """n x n neighbours of a grid side by side: [B, Y / n, X / n, n * n * C]."""
    B, Y, X, C = grid_BYXC.shape
    blocks = grid_BYXC.reshape(B, Y // n, n, X // n, n, C).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(B, Y // n, X // n, n * n * C)


def merge_order(grid_BYXC: jax.Array) -> jax.Array:
    """[B, Y, X, C] -> [B, Y * X, C] with the four patches of each 2x2 merge block in a row."""
    B, Y, X, C = grid_BYXC.shape
    return join(grid_BYXC, 2).reshape(B, Y * X, C)


def rows(images_BHW3: jax.Array, patch: int) -> VisionInput:
    """uint8 images of one size as CogViT's input."""
    B, H, W, _ = images_BHW3.shape
    Y, X = H // patch, W // patch
    patches = images_BHW3.reshape(B, Y, patch, X, patch, 3).transpose(0, 1, 3, 5, 2, 4).reshape(B, Y, X, -1)
    yx = jnp.stack(jnp.meshgrid(jnp.arange(Y), jnp.arange(X), indexing="ij"), -1)
    yx = jnp.broadcast_to(merge_order(yx[None]), (B, Y * X, 2))
    return VisionInput(merge_order(patches), yx, jnp.ones((B, Y * X), jnp.int32))
