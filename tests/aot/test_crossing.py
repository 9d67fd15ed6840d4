"""Bytes that cross an axis, against counts by hand, on programs for CPUs; those for TPUs differ in spelling alone, see
test_groups.py and test_hlo.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glmv_jax.aot.crossing import bytes_across
from glmv_jax.parallel import mesh as mesh_lib

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")

W = 64  # floats a device, 256 bytes


def compiled(mesh, local, axes):
    """The text of `local` on [W] floats a device, those being the rows of an array over `axes`."""
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False)
    shape = jax.ShapeDtypeStruct((8 * W,), jnp.float32, sharding=NamedSharding(mesh, P(axes)))
    return jax.jit(mapped).lower(shape).compile().as_text()


def turning(x, axis, turns=5):
    size = jax.lax.axis_size(axis)
    links = [(i, (i + 1) % size) for i in range(size)]
    return jax.lax.scan(lambda x, _: (jax.lax.ppermute(jnp.sin(x), axis, links), None), x, None, length=turns)[0]


def turning_twice(_, x):
    return turning(x, "data", 2)


@pytest.mark.parametrize(
    "local, kind, stage, data",
    [
        # Each of the 8 devices sends its 256 bytes, five times.
        (lambda x: turning(x, "stage"), "collective-permute", 5 * 8 * 256, 0),
        # A loop of two turns in one of three.
        (lambda x: jax.lax.fori_loop(0, 3, turning_twice, x), "collective-permute", 0, 6 * 8 * 256),
        # Each gets 256 bytes from the three others of its group.
        (lambda x: jax.lax.all_gather(x, "stage").sum(0), "all-gather", 8 * 3 * 256, 0),
        # Over both axes: of the 7 others 6 are on another stage, and 4 on another data shard.
        (lambda x: jax.lax.all_gather(x, ("stage", "data")).sum(0), "all-gather", 8 * 6 * 256, 8 * 4 * 256),
        # A quarter of the 256 bytes to each other one, and back.
        (lambda x: jax.lax.psum(x, "stage"), "all-reduce", 8 * 3 * 64 * 2, 0),
        (lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), 2), "reduce-scatter", 0, 8 * 128),
        (lambda x: jax.lax.all_to_all(x.reshape(4, -1), "stage", 0, 0).reshape(-1), "all-to-all", 8 * 3 * 64, 0),
    ],
)  # fmt: skip
def test_bytes_are_those_counted_by_hand(local, kind, stage, data):
    mesh = mesh_lib.make_mesh({"stage": 4, "data": 2})
    text = compiled(mesh, local, ("stage", "data"))
    assert bytes_across(text, mesh, "stage") == ({kind: stage} if stage else {})
    assert bytes_across(text, mesh, "data") == ({kind: data} if data else {})


def test_devices_are_numbered_as_in_the_mesh():
    """Not by their own ids: the same program on the same mesh with its devices turned round."""
    mesh = mesh_lib.make_mesh({"stage": 2, "data": 4})
    turned = jax.sharding.Mesh(mesh.devices[::-1, ::-1], mesh.axis_names)
    for one in (mesh, turned):
        text = compiled(one, lambda x: turning(x, "stage", 1), ("stage", "data"))
        assert bytes_across(text, one, "stage") == {"collective-permute": 8 * 256}
    assert np.prod(mesh.devices.shape) == 8
