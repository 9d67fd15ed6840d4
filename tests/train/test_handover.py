"""Weights of a run as a folder for a server: what `export_hf` would give, and what a server of ours reads."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from glmv_jax.interop import families
from glmv_jax.train import exchange, handover
from glmv_jax.trees import flatten, nest
from glmv_jax.typing import UserError
from tests.train.test_exchange import source  # noqa: F401


def test_a_public_model_is_handed_over_as_it_came(tmp_path, source):  # noqa: F811
    """Names, numbers and small files are those of the checkpoint; a server reads it in the dtypes that it has, to where
    it has them."""
    exchange.import_hf(source, tmp_path / "ours")
    params = exchange.load(tmp_path / "ours").params
    handover.write(params, tmp_path / "00000001", str(tmp_path / "ours"))
    theirs, given = load_file(source / "model.safetensors"), load_file(tmp_path / "00000001" / "model.safetensors")
    assert sorted(given) == sorted(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(given[name], tensor, err_msg=name)
    about = json.loads((tmp_path / "00000001" / "config.json").read_text())
    assert about["model_type"] in families.FAMILIES
    narrow = nest({path: x.astype("bfloat16") for path, x in flatten(params).items()})
    narrow = jax.device_put(narrow, jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec()))
    read = flatten(handover.reader(narrow)(tmp_path / "00000001"))
    for path, x in flatten(narrow).items():
        assert read[path].dtype == "bfloat16" and read[path].sharding.is_equivalent_to(x.sharding, x.ndim)
        np.testing.assert_array_equal(np.asarray(read[path]), np.asarray(x), err_msg=path)


def test_a_model_of_our_own_by_its_paths(tmp_path):
    params = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones((), np.float32)}
    handover.write(params, tmp_path / "new" / "00000000")
    assert sorted(load_file(tmp_path / "new" / "00000000" / "model.safetensors")) == ["a.kernel", "b"]
    read = handover.reader(params)
    np.testing.assert_array_equal(read(tmp_path / "new" / "00000000")["a"]["kernel"], params["a"]["kernel"])
    with pytest.raises(UserError, match="has shape .2, 3., but its config says"):
        handover.reader(params | {"a": {"kernel": np.zeros((3, 3))}})(tmp_path / "new" / "00000000")
    with pytest.raises(UserError, match="tensor c is missing"):
        handover.reader(params | {"c": np.zeros(3)})(tmp_path / "new" / "00000000")
