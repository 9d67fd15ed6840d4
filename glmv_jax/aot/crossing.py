"""Bytes that cross an axis of a mesh, such as the stages of a pipeline: of what devices need from each other those
between devices whose places on the axis differ, summed over all devices.

In a group of n of which each has b bytes an all-gather brings every device the b of n - 1 others, a reduce-scatter and
an all-to-all a part of them, an all-reduce is one and then the other; a permute sends what it sends. Links of a real
network may carry more, as other devices' bytes come by.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
from jax.sharding import Mesh

from glmv_jax.aot.costs import Transfer, schedule, transfers
from glmv_jax.aot.hlo import parse


def bytes_across(text: str, mesh: Mesh, axis: str) -> dict[str, int]:
    """{kind: bytes that cross `axis`} in one call of a compiled program (`compiled.as_text()`), of kinds that do.

    Raises: ValueError, also for a spelling of groups that is not known.
    """
    total: collections.Counter[str] = collections.Counter()
    for one in transfers(schedule(parse(text)), mesh.shape):
        if axis in one.axes:
            total[one.kind] += round(_links(one, mesh, axis) * _part(one) * one.step.times)
    return dict(total)


def _links(one: Transfer, mesh: Mesh, axis: str) -> int:
    """How many pairs of devices on different places send one another a part."""
    members: Any = one.groups  # which a collective that crosses an axis has
    place = np.unravel_index(members, mesh.devices.shape)[mesh.axis_names.index(axis)]
    if one.kind in ("collective-permute", "collective-broadcast"):  # only the first of a row sends
        return int((place != place[:, :1]).sum())
    return int((place[:, :, None] != place[:, None]).sum())


def _part(one: Transfer) -> float:
    if one.kind in ("all-gather", "collective-permute", "collective-broadcast"):
        return one.operand
    return one.operand / one.members * (2 if one.kind == "all-reduce" else 1)
