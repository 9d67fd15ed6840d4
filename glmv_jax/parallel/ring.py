"""A ring through all devices of a torus or grid, each a neighbour of the next.

The order in which a mesh numbers its devices goes row by row, so a shift by one crosses the whole grid at the end of
each row, and needs links of two dimensions: TPU v5e, which routes along one, then transfers synchronously.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

Cell = tuple[int, ...]


def ring_order(mesh: Mesh, axes: Sequence[str]) -> list[int]:
    """The indices along the flattened `axes`, in an order whose neighbours (the last and first too) share a link.

    As they are numbered where devices have no coordinates, fill no box of them, or belong to several slices.
    """
    first = [a for a in mesh.axis_names if a in axes]
    others = [a for a in mesh.axis_names if a not in axes]
    devices = np.transpose(mesh.devices, [mesh.axis_names.index(a) for a in (*first, *others)])
    devices = devices.reshape(int(np.prod([mesh.shape[a] for a in first])), -1)[:, 0]
    numbered = list(range(len(devices)))
    if len({getattr(d, "slice_index", 0) for d in devices}) > 1 or not hasattr(devices[0], "coords"):
        return numbered
    places = [(*d.coords, getattr(d, "core_on_chip", 0)) for d in devices]
    return _order(places) or numbered


def _order(places: Sequence[Cell]) -> list[int] | None:
    """`places` as a ring, by index; None unless they fill a box."""
    levels = [sorted(set(values)) for values in zip(*places)]
    index = {tuple(at.index(x) for at, x in zip(levels, place)): i for i, place in enumerate(places)}
    cells = cycle([len(at) for at in levels])
    return [index[c] for c in cells] if len(index) == len(cells) == len(places) else None


def cycle(sizes: Sequence[int]) -> list[Cell]:
    """All cells of a grid, each next to the one before, the last next to the first.

    There is no such way where all sizes are odd or all but one are 1; then it is one that does not close.
    """
    even = next((d for d, n in enumerate(sizes) if n % 2 == 0), None)
    if even is None:
        return path(sizes)
    back, *out = path([n for d, n in enumerate(sizes) if d != even])  # one column is kept for the way back
    n = sizes[even]
    cells = [(0, back)]
    cells += [(i, c) for i in range(n) for c in (out if i % 2 == 0 else out[::-1])]
    cells += [(i, back) for i in (reversed(range(1, n)) if out else range(1, n))]
    return [(*c[:even], i, *c[even:]) for i, c in cells]


def path(sizes: Sequence[int]) -> list[Cell]:
    """All cells of a grid, each next to the one before."""
    if not sizes:
        return [()]
    rest = path(sizes[1:])
    return [(i, *cell) for i in range(sizes[0]) for cell in (rest if i % 2 == 0 else rest[::-1])]
