"""Slash paths of trees, against trees written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax import trees

TREE = {"vision": {"blocks": {"q": 1, "k": 2}, "norm": 3}, "vis": 4}
NAMED = {"vision/blocks/q": 1, "vision/blocks/k": 2, "vision/norm": 3, "vis": 4}


def test_there_and_back():
    assert trees.flatten(TREE) == NAMED and trees.nest(NAMED) == TREE
    assert list(trees.flatten(TREE).values()) == jax.tree.leaves(TREE)
    assert trees.flatten(NAMED) == NAMED  # what is by path already stays so
    assert trees.flatten({"a": [5, (6,)]}) == {"a/0": 5, "a/1/0": 6}
    axes = {"a": {"b": ("embed", "mlp"), "c": ()}}
    assert trees.flatten(axes, is_leaf=lambda x: isinstance(x, tuple)) == {"a/b": ("embed", "mlp"), "a/c": ()}


@pytest.mark.parametrize(
    ("subtrees", "found"),
    [
        ((), list(NAMED)),
        (["vision"], ["vision/blocks/q", "vision/blocks/k", "vision/norm"]),
        (["vis/"], ["vis"]),
        (["vision/blocks", "vision/norm"], ["vision/blocks/q", "vision/blocks/k", "vision/norm"]),
        (["vision/bl"], []),
    ],
)
def test_inside(subtrees, found):
    assert trees.inside(NAMED, subtrees) == {name: NAMED[name] for name in found}


def test_replaced():
    got = trees.replaced(TREE, {"vision/blocks/k": 20, "vision": 30})  # the second is no leaf here
    assert got == {"vision": {"blocks": {"q": 1, "k": 20}, "norm": 3}, "vis": 4}
    assert TREE["vision"]["blocks"]["k"] == 2


def test_put_like():
    x = np.arange(8.0).reshape(8, 1)
    plain = trees.put_like(x, np.zeros((8, 1), np.float32))
    assert type(plain) is np.ndarray and plain.dtype == np.float32
    where = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    for like in (
        jax.device_put(jnp.zeros((8, 1), jnp.bfloat16), where),
        jax.ShapeDtypeStruct((8, 1), jnp.bfloat16, sharding=where),
    ):
        put = trees.put_like(x, like)
        assert put.sharding == where and put.dtype == jnp.bfloat16 and np.array_equal(np.asarray(put, np.float64), x)
