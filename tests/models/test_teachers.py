"""HOG against scikit-image; the patch rows of images against the host-side ones; the MIM student's masking."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from skimage.feature import hog

from glmv_jax import models
from glmv_jax.models import mim, teachers
from tests.random_params import random_params


def test_hog_equals_scikit_image():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    ours = np.asarray(teachers.hog_cells(jnp.array(image, jnp.float32)[None] / 255.0, 4, 9))[0].reshape(8, 12, 3, 9)
    for colour in range(3):
        theirs = hog(
            image[..., colour] / 255.0, orientations=9, pixels_per_cell=(4, 4), cells_per_block=(1, 1),
            block_norm="L2", feature_vector=False,
        )[:, :, 0, 0]  # fmt: skip
        np.testing.assert_allclose(ours[:, :, colour], theirs, atol=1e-4)


def test_merge_order_by_brute_force():
    grid = np.arange(4 * 6).reshape(1, 4, 6, 1)
    by_hand = [grid[0, 2 * by + y, 2 * bx + x, 0] for by in range(2) for bx in range(3) for y in (0, 1) for x in (0, 1)]
    np.testing.assert_array_equal(teachers.merge_order(jnp.array(grid))[0, :, 0], by_hand)


def test_rows_hold_the_pixels_they_say():
    image = np.random.default_rng(1).integers(0, 256, (1, 16, 32, 3)).astype(np.uint8)
    vision = teachers.rows(jnp.array(image), 8)
    for row in range(8):
        y, x = np.asarray(vision.yx)[0, row]
        pixels = image[0, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        np.testing.assert_array_equal(np.asarray(vision.patches)[0, row].reshape(3, 8, 8), pixels.transpose(2, 0, 1))


def test_masked_pixels_are_not_seen():
    """Changing the pixels of a masked patch changes no prediction; of a visible one, all."""
    vision_cfg = models.CogViTConfig(depth=2, width=32, heads=4, mlp=64, patch=4)
    cfg = mim.MIMConfig(vision_cfg, mim.HeadsConfig(32, 48, (("a", 5), ("b", 7))))
    params = random_params(cfg)
    image = jnp.array(np.random.default_rng(2).integers(0, 255, (1, 16, 16, 3)).astype(np.uint8))
    vision = teachers.rows(image, 4)
    mask = jnp.zeros((1, 16), bool).at[0, 5].set(True)
    predict = lambda v: mim.apply(cfg, params, v, mask)["b"]  # noqa: E731
    before = predict(vision)
    assert before.shape == (1, 16, 7)
    np.testing.assert_array_equal(before, predict(vision._replace(patches=vision.patches.at[0, 5].add(1))))
    assert np.all(np.any(np.asarray(before != predict(vision._replace(patches=vision.patches.at[0, 6].add(1)))), -1))
