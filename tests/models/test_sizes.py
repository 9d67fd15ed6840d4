"""Sizes asserted from abstract shapes: nothing is allocated."""

from __future__ import annotations

import math

import jax
import pytest

from glmv_jax import models, presets
from glmv_jax.models import build
from glmv_jax.parallel import axes


def test_the_403m_encoder():
    params = models.abstract_params(models.CogViTConfig())
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params["blocks"])) == 403_024_896
    assert models.count(models.CogViTConfig()) == 404_231_168
    assert models.count(models.MergerConfig()) == 6_292_992 + 23_596_032


@pytest.mark.parametrize("size", ["nano", "l"])
def test_presets_build_and_name_every_dimension(size):
    for cfg in (
        build.vision(presets.vision(size)),
        build.two_tower(presets.two_tower(size)),
        build.vlm(presets.vlm(size)),
    ):
        shapes, names = models.abstract_params(cfg), models.logical_axes(cfg)
        is_names = lambda x: isinstance(x, tuple)  # noqa: E731
        assert jax.tree.structure(shapes) == jax.tree.structure(names, is_leaf=is_names)
        for shape, axis in zip(jax.tree.leaves(shapes), jax.tree.leaves(names, is_leaf=is_names)):
            assert len(axes.check(axis)) == len(shape.shape)
