"""Meshes of several slices, of devices that are not here, and what is said of sizes that do not fit."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from glmv_jax import presets
from glmv_jax.parallel import mesh as lib
from glmv_jax.typing import UserError

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU as `make_mesh` looks at."""

    id: int
    slice_index: int
    platform: str = "tpu"


def chips(slices, each):
    """Numbered so that slices are mixed."""
    return [Chip(i * slices + s, s) for i in range(each) for s in range(slices)]


@pytest.fixture
def no_torus(monkeypatch):
    """Chips of these tests have no coordinates: those of a slice stay in their order."""
    monkeypatch.setattr(lib, "_arranged", lambda plan, part: np.array(part, object).reshape(plan.inside))


@needs_8
@pytest.mark.parametrize("sizes, shape", [
    ({"fsdp": -1}, {"fsdp": 8}), ({}, {"data": 8}), ({"tensor": 2, "fsdp": -1}, {"fsdp": 4, "tensor": 2}),
    ({"data": 1, "fsdp": 8, "tensor": 1}, {"fsdp": 8}), (presets.mesh(data=-1), {"data": 8}),
    ({"fsdp": -1, "dcn": {"data": 2}}, {"data": 2, "fsdp": 4}), ({"dcn": {"data": 4}}, {"data": 8}),
    ({"fsdp": 2, "tensor": 2, "dcn": {"fsdp": 2}}, {"fsdp": 4, "tensor": 2}),
    (presets.mesh(fsdp=2, expert=4), {"fsdp": 2, "expert": 4}),
])  # fmt: skip
def test_sizes(sizes, shape):
    """The same here and for devices that are not; in the order of MESH_AXES, axes of one device left out."""
    for mesh in (lib.make_mesh(dict(sizes)), lib.abstract_mesh(dict(sizes), 8)):
        assert dict(mesh.shape) == shape and list(mesh.shape) == [a for a in lib.MESH_AXES if a in shape]


def test_one_device_is_a_mesh_too():
    assert dict(lib.make_mesh({"fsdp": -1, "tensor": 1}, jax.devices()[:1]).shape) == {"fsdp": 1}


def test_axes_within_a_slice_stay_there(no_torus):
    """fsdp and tensor never leave a slice, data does; an axis over both goes through a slice first."""
    mesh = lib.make_mesh({"fsdp": 2, "tensor": 2, "dcn": {"data": 2}}, chips(2, 4))
    of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert mesh.devices.shape == (2, 2, 2)
    assert [set(of[i].flat) for i in range(2)] == [{0}, {1}]
    mesh = lib.make_mesh({"fsdp": 4, "dcn": {"fsdp": 2}}, chips(2, 4))
    assert [chip.slice_index for chip in mesh.devices] == [0] * 4 + [1] * 4
    mesh = lib.make_mesh({"data": 2, "tensor": 2, "dcn": {"data": 2, "stage": 2}}, chips(4, 4))
    of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert dict(mesh.shape) == {"stage": 2, "data": 4, "tensor": 2}
    assert of[:, :, 0].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]] and (of[..., 0] == of[..., 1]).all()


@pytest.mark.parametrize("sizes, devices, message", [
    ({"fsdp": 8}, (2, 4), r"the devices are of 2 slices; say which axis goes across them, as in mesh.dcn.data=2"),
    ({"fsdp": -1, "dcn": {"data": 4}}, (2, 4), r"dcn is \{'data': 4\}, but the devices are of 2 slices"),
    ({"fsdp": 8, "dcn": {"data": 2}}, (2, 4), r"needs 8 devices but 4 are in each of 2 slices"),
    ({"fsdp": -1, "dcn": {"dta": 2}}, (2, 4), r"mesh axis 'dta' is not known; choose from stage, data, .*, dcn"),
    ({"fsdp": -1, "tensor": 3}, (1, 8), r"the sizes beside -1 make 3, which does not divide 8"),
    ({"fsdp": -1, "tensor": -1}, (1, 8), r"only one axis may be -1"),
    ({"fsdp": 0}, (1, 8), r"a size is 1 or more, or -1"),
])  # fmt: skip
def test_what_does_not_fit_is_said_with_the_remedy(no_torus, sizes, devices, message):
    with pytest.raises(UserError, match=message):
        lib.make_mesh(sizes, chips(*devices))


def test_devices_that_are_not_here():
    assert dict(lib.abstract_mesh({"fsdp": 64, "expert": 8}).shape) == {"fsdp": 64, "expert": 8}
    assert lib.abstract_mesh({"fsdp": -1, "dcn": {"data": 2}}, 1024).size == 1024
    with pytest.raises(UserError, match="nobody said of how many; give --devices"):
        lib.abstract_mesh({"fsdp": -1})
    with pytest.raises(UserError, match="needs 512 devices but 256 are in each of 2 slices"):
        lib.abstract_mesh({"fsdp": 512, "dcn": {"data": 2}}, 512)


def test_an_experiment_can_set_every_axis():
    assert set(presets.mesh()) == {*lib.MESH_AXES, lib.DCN} and set(presets.mesh().dcn) < set(lib.MESH_AXES)


@needs_8
def test_rows_are_split_over_experts_too():
    mesh = lib.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    assert lib.data_axes(mesh) == ("fsdp", "expert") and lib.data_shards(mesh) == 4
