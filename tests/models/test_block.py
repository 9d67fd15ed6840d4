"""The block that every tower is made of."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from glmv_jax.kernels.span import Span
from glmv_jax.models import rope
from glmv_jax.models.block import BlockConfig, stack
from tests.random_params import switched_on


class Tower(nn.Module):
    cfg: BlockConfig

    @nn.compact
    def __call__(self, x_BTD):
        span = Span(np.ones(x_BTD.shape[:2], np.int32))
        return stack(self.cfg, 3, "none", x_BTD, None, span, span)[0]


@pytest.mark.parametrize("post_norms", [False, True])
def test_a_fresh_tower_is_the_identity_and_learns(post_norms):
    """Every branch starts at zero, and the gradient reaches its last matrix or gain all the same."""
    tower = Tower(BlockConfig(32, 2, 48, post_norms=post_norms, identity=True, rotate=rope.no_rotation))
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    params = nn.meta.unbox(tower.init(jax.random.key(1), x))
    np.testing.assert_array_equal(tower.apply(params, x), x)
    assert np.abs(tower.apply(switched_on(params), x) - x).mean() > 0.1
    grads = jax.grad(lambda p: (tower.apply(p, x) * x[::-1]).sum())(params)["params"]["blocks"]
    ends = [grads["post_norm1"], grads["post_norm2"]] if post_norms else [grads["attention"]["o"], grads["mlp"]["down"]]
    assert all(np.abs(g).max() > 0 for end in ends for g in jax.tree.leaves(end))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pairs_turn_alike_in_both_forms(dtype, monkeypatch):
    """By a product, as on TPUs, exactly; and in a wider head, what is beside the rotated part stays."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8), dtype)
    turned = rope.sections(jnp.arange(30).reshape(2, 5, 3), 8, 100.0, (1, 1, 2))
    want = rope.rotate_pairs(x, turned)
    wide, around = jnp.concatenate([x[..., :2], x, x[..., 4:]], axis=-1), rope.widened(turned, 2, 4)
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(rope.rules, "device", lambda platform=platform: types.SimpleNamespace(platform=platform))
        np.testing.assert_array_equal(rope.rotate_pairs(x, turned), want)
        before, rotated, after = jnp.split(rope.rotate_pairs(wide, around), [2, 10], axis=-1)
        for got, right in ((before, x[..., :2]), (rotated, want), (after, x[..., 4:])):
            np.testing.assert_array_equal(got, right)
