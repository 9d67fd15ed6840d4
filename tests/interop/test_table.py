"""Tables of tensors: which of theirs lands where in our stacks, by brute force over every index."""

from __future__ import annotations

import numpy as np
import pytest

from glmv_jax.interop.table import Entry, fused, matrix, same, to_params, to_tensors
from glmv_jax.typing import UserError


def random_tensors(names, shape):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name in names}


def test_layers_of_two_kinds_stack_in_the_order_named():
    table = [
        Entry("layers.{i}.a", ("dense/a",), matrix, 3),
        Entry("layers.{i}.a", ("sparse/a",), matrix, range(3, 7)),
        Entry("layers.{i}.b", ("odd/b", "odd/c"), fused(2, same), (5, 1)),
        Entry("layers.7.a", ("mtp/a",), matrix),
    ]
    tensors = random_tensors([f"layers.{i}.a" for i in range(8)] + ["layers.1.b", "layers.5.b"], (4, 6))
    params = to_params(table, tensors)
    assert params["dense"]["a"].shape == (3, 6, 4) and params["sparse"]["a"].shape == (4, 6, 4)
    for i in range(4):
        np.testing.assert_array_equal(params["sparse"]["a"][i], tensors[f"layers.{3 + i}.a"].T)
    np.testing.assert_array_equal(params["odd"]["c"], [tensors["layers.5.b"][2:], tensors["layers.1.b"][2:]])
    np.testing.assert_array_equal(params["mtp"]["a"], tensors["layers.7.a"].T)
    back = to_tensors(table, params)
    assert back.keys() == tensors.keys() and all((back[n] == tensors[n]).all() for n in tensors)


def test_experts_stack_behind_layers():
    table = [
        Entry("layers.{i}.experts.{e}.up", ("up",), matrix, range(3, 5), 3),
        Entry("mtp.experts.{e}.up", ("mtp/up",), matrix, None, 2),
    ]
    names = [f"layers.{i}.experts.{e}.up" for i in (3, 4) for e in range(3)] + [f"mtp.experts.{e}.up" for e in (0, 1)]
    tensors = random_tensors(names, (2, 5))
    params = to_params(table, tensors)
    assert params["up"].shape == (2, 3, 5, 2) and params["mtp"]["up"].shape == (2, 5, 2)
    for layer in range(2):
        for expert in range(3):
            theirs = tensors[f"layers.{3 + layer}.experts.{expert}.up"]
            np.testing.assert_array_equal(params["up"][layer, expert], theirs.T)
    np.testing.assert_array_equal(params["mtp"]["up"][1], tensors["mtp.experts.1.up"].T)
    back = to_tensors(table, params)
    assert back.keys() == tensors.keys() and all((back[n] == tensors[n]).all() for n in tensors)


def test_a_layer_outside_the_range_is_unknown():
    table = [Entry("layers.{i}.a", ("a",), same, range(1, 3))]
    with pytest.raises(UserError, match="the first is layers.0.a"):
        to_params(table, random_tensors(["layers.0.a", "layers.1.a", "layers.2.a"], (2,)))
    with pytest.raises(UserError, match="layers.2.a is missing"):
        to_params(table, random_tensors(["layers.1.a"], (2,)))
