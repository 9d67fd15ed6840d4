"""Device meshes. Axis names are a closed list; sizes come from the experiment (`-1` takes what is left)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from glmv_jax.typing import UserError

MESH_AXES: dict[str, str] = {
    "stage": "pipeline stages",
    "data": "rows of the batch, parameters replicated",
    "fsdp": "rows of the batch, parameters split",
    "expert": "experts",
    "context": "positions of a row",
    "tensor": "heads, MLP, vocabulary",
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `sizes` in the order of MESH_AXES; one size may be -1.

    Raises UserError for an unknown axis name or when the sizes do not multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    for name in sizes:
        if name not in MESH_AXES:
            raise UserError(f"mesh axis {name!r} is not known; choose from {', '.join(MESH_AXES)}")
    names = tuple(n for n in MESH_AXES if n in sizes) or ("data",)
    shape = [sizes.get(n, -1) for n in names]
    if shape.count(-1) > 1:
        raise UserError(f"mesh {dict(sizes)}: only one axis may be -1")
    if -1 in shape:
        known = math.prod(s for s in shape if s != -1)
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UserError(f"mesh {dict(zip(names, shape))} needs {math.prod(shape)} devices but {len(devices)} are here")
    return jax.make_mesh(shape, names, devices=devices, axis_types=(AxisType.Auto,) * len(names))


DATA_AXES = ("data", "fsdp")


def data_axes(mesh: Mesh | None) -> tuple[str, ...]:
    """The axes of `mesh` that split the rows of a batch; none without a mesh."""
    return tuple(axis for axis in DATA_AXES if mesh is not None and axis in mesh.shape)


def data_shards(mesh: Mesh | None) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in data_axes(mesh)) if mesh is not None else 1


def check_batch(batch: int, mesh: Mesh) -> None:
    """UserError when `batch` rows do not divide over the data axes of `mesh`; names the nearest size that does."""
    parts = data_shards(mesh)
    if batch % parts:
        raise UserError(f"batch={batch} does not divide over {parts} data shards; try {-(-batch // parts) * parts}")
