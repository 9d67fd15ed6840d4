"""Device meshes. Axis names are a closed list; sizes come from the experiment (`-1` takes what is left).

    mesh = {"fsdp": -1}                                        every device there is
    mesh = {"fsdp": 8, "expert": 32, "tensor": 2}              512 of one slice
    mesh = {"fsdp": -1, "tensor": 4, "dcn": {"data": 2}}       two slices, each with a copy of the parameters

Sizes are those within a slice, whose devices have links of their own (ICI; NVLink); `dcn` has those across slices,
which the network of the data centre joins. An axis named in both is as long as their product, slice after slice. In the
order of MESH_AXES neighbours along a later axis are nearer each other: what talks most comes last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from glmv_jax.typing import UserError

MESH_AXES: dict[str, str] = {
    "stage": "layers of the decoder; rows of the batch elsewhere",
    "data": "rows of the batch, parameters replicated",
    "fsdp": "rows of the batch, parameters split",
    "expert": "rows of the batch, experts split, and other parameters as over fsdp",
    "context": "positions of a row",
    "tensor": "heads, MLP, vocabulary",
}
DCN = "dcn"


class _Plan(NamedTuple):
    """names: the axes; inside, across: their sizes in a slice and over slices."""

    names: tuple[str, ...]
    inside: tuple[int, ...]
    across: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(a * b for a, b in zip(self.across, self.inside))


def make_mesh(sizes: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `devices` with the axes of `sizes` (see the file's head), in the order of MESH_AXES; those of one
    device are left out.

    On CPUs, which know no slices, equal runs of devices stand for them. Raises UserError for an unknown axis name and
    for sizes that do not multiply to the number of devices, or of slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    slices = _slices(devices, dict(sizes.get(DCN, {})))
    plan = _plan(sizes, len(devices), len(slices))
    parts = np.stack([_arranged(plan, part) for part in slices]).reshape(*plan.across, *plan.inside)
    n = len(plan.names)
    beside = [axis for pair in zip(range(n), range(n, 2 * n)) for axis in pair]
    return Mesh(parts.transpose(beside).reshape(plan.shape), plan.names, axis_types=(AxisType.Auto,) * n)


def abstract_mesh(sizes: Mapping[str, Any], devices: int = 0) -> AbstractMesh:
    """As `make_mesh`, for so many devices that are not here; 0: as many as the sizes multiply to. UserError as there,
    and when a size is -1 and there is no number of devices."""
    outer = dict(sizes.get(DCN, {}))
    inner = [n for name, n in sizes.items() if name != DCN]
    if not devices and -1 in (*inner, *outer.values()):
        raise UserError(f"mesh {_shown(sizes)}: -1 takes what is left, and nobody said of how many; give --devices")
    slices = math.prod(abs(n) for n in outer.values())
    plan = _plan(sizes, devices or slices * math.prod(inner), slices)
    return AbstractMesh(plan.shape, plan.names, axis_types=(AxisType.Auto,) * len(plan.names))


def _plan(sizes: Mapping[str, Any], devices: int, slices: int) -> _Plan:
    inner = {name: n for name, n in sizes.items() if name != DCN}
    outer = dict(sizes.get(DCN, {}))
    for name in (*inner, *outer):
        if name not in MESH_AXES:
            raise UserError(f"mesh axis {name!r} is not known; choose from {', '.join((*MESH_AXES, DCN))}")
    names = tuple(n for n in MESH_AXES if n in inner or n in outer) or ("data",)
    across = _filled([outer.get(n, 1) for n in names], slices, f"mesh.dcn {outer}")
    if math.prod(across) != slices:
        hint = {n: k for n, k in zip(names, across) if k > 1} or "nothing"
        raise UserError(f"mesh: dcn is {hint}, but the devices are of {slices} slices; "
                        f"say which axis goes across them, as in mesh.dcn.data={slices}")  # fmt: skip
    if devices % slices:
        raise UserError(f"mesh {_shown(sizes)}: {devices} devices are no {slices} equal slices; change mesh.dcn")
    each = devices // slices
    inside = _filled([inner.get(n, 1 if inner else -1 if n == names[0] else 1) for n in names], each,
                     f"mesh {_shown(sizes)}")  # fmt: skip
    if math.prod(inside) != each:
        where = "are here" if slices == 1 else f"are in each of {slices} slices"
        raise UserError(f"mesh {_shown(sizes)} needs {math.prod(inside)} devices but {each} {where}")
    kept = [i for i, name in enumerate(names) if inside[i] * across[i] > 1] or [0]
    return _Plan(tuple(names[i] for i in kept), tuple(inside[i] for i in kept), tuple(across[i] for i in kept))


def _filled(sizes: list[int], total: int, what: str) -> list[int]:
    """The sizes, with what is left of `total` in place of a -1."""
    if sizes.count(-1) > 1:
        raise UserError(f"{what}: only one axis may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if any(s < 1 for s in sizes if s != -1):
        raise UserError(f"{what}: a size is 1 or more, or -1 for what is left")
    if -1 in sizes and total % known:
        raise UserError(f"{what}: the sizes beside -1 make {known}, which does not divide {total}")
    return [total // known if s == -1 else s for s in sizes]


def _shown(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say something."""
    outer = {n: k for n, k in dict(sizes.get(DCN, {})).items() if k != 1}
    return {n: k for n, k in sizes.items() if n != DCN and k != 1} | ({DCN: outer} if outer else {})


def _slices(devices: list[jax.Device], outer: Mapping[str, int]) -> list[list[jax.Device]]:
    if devices[0].platform == "cpu":
        count = max(1, math.prod(abs(n) for n in outer.values()))
        if len(devices) % count:
            raise UserError(f"mesh.dcn {dict(outer)}: {len(devices)} devices are no {count} equal slices")
        each = len(devices) // count
        return [devices[i * each : (i + 1) * each] for i in range(count)]
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [found[index] for index in sorted(found)]


def _arranged(plan: _Plan, devices: list[jax.Device]) -> np.ndarray:
    """The devices of one slice, as its links are."""
    try:
        axis_types = (AxisType.Auto,) * len(plan.names)
        return jax.make_mesh(plan.inside, plan.names, devices=devices, axis_types=axis_types).devices
    except NotImplementedError:  # no whole dimensions of the torus make these sizes
        return mesh_utils.create_device_mesh(plan.inside, devices, allow_split_physical_axes=True)


DATA_AXES = ("data", "fsdp", "expert", "stage")


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
