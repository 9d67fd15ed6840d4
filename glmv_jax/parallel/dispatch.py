"""Images in rows of the encoder's own: which devices have them, and which exchange their visual tokens (`models.home`).

All devices of the mesh encode, those too that share rows of text, which are more than a batch has rows; within the
encoder its matrices are then gathered over `context` and `tensor`, for a batch of images is more than they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import DATA_AXES, data_axes, data_shards
from glmv_jax.typing import UserError

SHARING = ("context", "tensor")  # axes whose devices share rows of text; each encodes images of its own


def over(mesh: Any) -> tuple[str, ...]:
    """The axes that the encoder's rows are split over: all of the mesh, those that share rows of text last."""
    return (*data_axes(mesh), *(axis for axis in SHARING if axis in mesh.shape))


def sharding(mesh: Any, count: int) -> NamedSharding:
    """Where the encoder's rows of a batch live. UserError when they do not divide over all devices."""
    if count % mesh.size:
        raise UserError(f"data.dispatch.rows={count} does not divide over {mesh.size} devices, all of which encode; "
                        f"try {-(-count // mesh.size) * mesh.size}")  # fmt: skip
    return NamedSharding(mesh, P(over(mesh)))


def places(mesh: Any, batch: int, tokens: int) -> int:
    """Visual tokens a device gets, where each of the `batch` rows of text has up to `tokens`: its share of a row's."""
    ranks = 1 if mesh is None else data_shards(mesh)
    return -(-(batch // ranks) * tokens * ranks // (1 if mesh is None else mesh.size))


@contextlib.contextmanager
def encoding() -> Iterator[None]:
    """Within it the rules in force are the encoder's: its rows over all axes, and nothing else over those that share
    rows of text."""
    if (found := rules_lib.active()) is None:
        yield
        return
    mesh, rules = found
    for axis in SHARING:
        rules = rules.without(axis)
    with rules_lib.use(mesh, dataclasses.replace(rules, table={**rules.table, "batch": (*DATA_AXES, *SHARING)})):
        yield


def of_processes(mesh: Mesh) -> tuple[tuple[int, ...], ...] | None:
    """The devices of each process, numbered along `over`; None for one process.

    Raises: UserError when they are no whole groups of those that share rows of text.
    """
    axes = over(mesh)
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in axes]).reshape(-1)
    owner = np.array([device.process_index for device in devices])
    groups = tuple(tuple(map(int, np.flatnonzero(owner == one))) for one in np.unique(owner))
    share = mesh.size // data_shards(mesh)  # devices that share rows of text
    if any(len(group) != share * len({n // share for n in group}) for group in groups):
        raise UserError(f"data.dispatch: {share} devices of context x tensor share rows of text and are not all of one "
                        "process; make these axes smaller, or set data.dispatch.rows=0")  # fmt: skip
    return groups if len(groups) > 1 else None

