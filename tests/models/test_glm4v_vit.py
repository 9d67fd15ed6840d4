"""The table of positions of GLM-4.1V's tower: its resizing against torch, the grids it is resized to, and invariances.

Parity of the whole tower with transformers is in tests/interop/test_glm4v.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax import models
from glmv_jax.models import cogvit
from glmv_jax.models.glm4v_vit import Glm4vViTConfig, bicubic, grids
from glmv_jax.typing import VisionInput

CFG = Glm4vViTConfig(depth=2, width=32, heads=4, mlp=48, patch=4, table=5)


def coordinates(rows: int, columns: int) -> np.ndarray:
    return np.stack(np.mgrid[:rows, :columns], -1).reshape(1, -1, 2)


@pytest.mark.parametrize("grid", [(5, 5), (4, 6), (1, 17), (30, 2)])
def test_resizing_is_that_of_grid_sample(grid):
    torch = pytest.importorskip("torch")
    table_ND = np.random.default_rng(0).normal(size=(25, 7))
    yx = coordinates(*grid)
    got = bicubic(jnp.array(table_ND, jnp.float32), jnp.array(yx), jnp.broadcast_to(jnp.array(grid), yx.shape))
    xy_in_one = (yx[..., ::-1] + 0.5) / np.array(grid[::-1]) * 2 - 1
    want = torch.nn.functional.grid_sample(
        torch.tensor(table_ND.T.reshape(1, 7, 5, 5)), torch.tensor(xy_in_one[:, None]), mode="bicubic",
        padding_mode="border", align_corners=False)[0, :, 0].T  # fmt: skip
    np.testing.assert_allclose(got[0], want, atol=1e-5)
    if grid == (5, 5):
        np.testing.assert_allclose(got[0], table_ND, atol=1e-5)


def test_grids_are_those_of_each_frame():
    """Two rows: frames of 2 x 4 and 4 x 2, then padding; and one frame of 2 x 8."""
    yx = np.zeros((2, 20, 2), np.int32)
    yx[0, :16] = np.concatenate([coordinates(2, 4)[0], coordinates(4, 2)[0]])
    yx[1, :16] = coordinates(2, 8)[0]
    frame = np.array([[1] * 8 + [2] * 8 + [0] * 4, [1] * 16 + [0] * 4])
    got = np.asarray(grids(jnp.array(yx), jnp.array(frame)))
    want = np.ones_like(yx)
    want[0, :8], want[0, 8:16], want[1, :16] = (2, 4), (4, 2), (2, 8)
    np.testing.assert_array_equal(got, want)


def test_a_frame_is_the_same_alone_and_among_others():
    params = models.init_params(CFG, jax.random.key(0))
    params["position"]["embedding"] *= 50.0
    rng = np.random.default_rng(0)
    shapes = [(4, 6), (2, 2), (2, 8)]
    patches = rng.normal(size=(1, sum(h * w for h, w in shapes) + 4, CFG.patch_dim)).astype(np.float32)
    yx = np.concatenate([*(coordinates(h, w) for h, w in shapes), np.zeros((1, 4, 2), int)], 1)
    frame = np.concatenate([np.full(h * w, n) for n, (h, w) in enumerate(shapes, 1)] + [np.zeros(4, int)])[None]
    run = jax.jit(lambda *row: cogvit.apply(CFG, params, VisionInput(*row)))
    together = np.asarray(run(patches, yx, frame))
    assert np.isfinite(together).all()
    for number in (1, 2, 3):
        its = np.flatnonzero(frame[0] == number)
        alone = [np.zeros_like(x) for x in (patches, yx, frame)]
        for to, x in zip(alone, (patches, yx, np.ones_like(frame))):
            to[:, : len(its)] = x[:, its]
        np.testing.assert_allclose(run(*alone)[0, : len(its)], together[0, its], atol=1e-5)


def test_size_of_the_released_tower():
    """24 layers of 4 * 1536^2 + 3 * 1536 * 4096 + 2 * 1536, a table of 24 x 24, patches of 1176 numbers, two norms."""
    layers = 24 * (4 * 1536**2 + 3 * 1536 * 4096 + 2 * 1536)
    assert models.count(Glm4vViTConfig()) == layers + 24**2 * 1536 + (1176 + 1) * 1536 + 2 * 1536
