"""The GLM-4.5 decoder's numbers about itself: what its FLOPs, axes and rematerialisation say against its parameters.

Parity with transformers is in tests/interop/test_glm4v_moe.py.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax import models
from glmv_jax.kernels.span import Span
from glmv_jax.models import decoder
from glmv_jax.models.glm4_moe import GLM4MoEConfig
from glmv_jax.models.glm4v_vit import Glm4vViTConfig
from glmv_jax.parallel import axes
from glmv_jax.trees import flatten
from tests.random_params import random_params

CFG = GLM4MoEConfig(
    vocab=64, depth=3, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, dense=1, expert_mlp=12, experts=6, chosen=2,
    shared=1, rope_split=(1, 1, 0), qk_norm=True,
)  # fmt: skip


@pytest.mark.parametrize("dense", [0, 1, 3])
def test_flops_are_those_of_the_matrices_that_a_token_meets(dense):
    cfg = dataclasses.replace(CFG, dense=dense)
    met = 0.0
    for path, x in flatten(models.abstract_params(cfg)).items():
        name = path.rsplit("/", 1)[-1]
        if "moe/" in path and name in ("gate", "up", "down"):  # stacked experts, of which a few are chosen
            met += math.prod(x.shape) * cfg.chosen / cfg.experts
        elif name in ("kernel", "head", "router"):
            met += math.prod(x.shape)
    keys = 7.0
    assert cfg.flops(5, keys) == pytest.approx(5 * (2 * met + cfg.depth * 4 * keys * cfg.heads * cfg.head_dim))


@pytest.mark.parametrize(
    "cfg", [CFG, Glm4vViTConfig(depth=2, width=32, heads=4, mlp=48, patch=4, table=5)], ids=["decoder", "tower"]
)
def test_every_dimension_has_a_name(cfg):
    shapes = flatten(models.abstract_params(cfg))
    names = flatten(models.logical_axes(cfg), is_leaf=lambda x: isinstance(x, tuple))
    assert shapes.keys() == names.keys()
    for path, shape in shapes.items():
        assert len(axes.check(names[path])) == len(shape.shape), path


def test_layers_that_are_recomputed_give_the_same_gradients():
    small, rng = dataclasses.replace(CFG, depth=2), np.random.default_rng(0)
    params = random_params(small)
    x_BTD = jnp.array(rng.normal(size=(2, 9, 32)), jnp.float32)
    segments = jnp.array([[1] * 9, [1] * 6 + [0] * 3])
    span = Span(segments, jnp.broadcast_to(jnp.arange(9), (2, 9)))
    positions = jnp.broadcast_to(jnp.arange(9)[None, :, None], (2, 9, 3))

    def gradients(remat):
        cfg = dataclasses.replace(small, remat=remat)

        def scalar(params):
            out = decoder.apply(cfg, params, x_BTD, positions, span, span)
            return jnp.sum(jnp.sin(out.hidden) * segments[..., None]) + out.aux["blocks1"]["balance"].sum()

        return jax.jit(jax.grad(scalar))(params)

    kept, again = flatten(gradients("none")), flatten(gradients("full"))
    for path, g in kept.items():
        np.testing.assert_allclose(again[path], g, atol=1e-5, rtol=1e-5, err_msg=path)
    assert float(jnp.abs(kept["blocks1/moe/router"]).max()) > 0
