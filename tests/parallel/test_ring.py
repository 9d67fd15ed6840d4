"""Rings through grids of devices. Not covered: that the links are where the coordinates say."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.ring import cycle, path, ring_order


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple[int, ...]
    core_on_chip: int = 0
    slice_index: int = 0


def apart(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


GRIDS = [(2, 2), (2, 4), (4, 2), (3, 4), (8, 8), (16, 16), (5, 2), (4, 4, 4), (3, 3, 2), (8, 8, 4, 1), (1, 4, 1, 2),
         (2,), (1, 2), (1, 1)]  # fmt: skip


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_a_cycle_visits_every_cell_once_and_closes(sizes):
    cells = cycle(sizes)
    assert sorted(cells) == sorted(itertools.product(*map(range, sizes)))
    assert all(apart(cells[i - 1], cells[i]) == 1 for i in range(len(cells)) if len(cells) > 1)


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (8,), (3, 5, 3)], ids=str)
def test_where_none_closes_it_is_a_path(sizes):
    for cells in (cycle(sizes), path(sizes)):
        assert sorted(cells) == sorted(itertools.product(*map(range, sizes)))
        assert all(apart(a, b) == 1 for a, b in itertools.pairwise(cells))


@pytest.mark.parametrize("names, axes", [
    (("data",), ("data",)), (("data", "fsdp"), ("data", "fsdp")), (("fsdp", "tensor"), ("fsdp",)),
    (("context", "data"), ("data",)),
])  # fmt: skip
def test_the_ring_of_a_mesh_goes_from_neighbour_to_neighbour(names, axes):
    """Chips of a 4 x 4 grid, numbered at random along the ring's axes and by a third coordinate along the others."""
    place = np.random.default_rng(0).permutation(16)
    layers = 1 if set(names) == set(axes) else 2
    chips = np.empty((16, layers), object)
    for i, z in itertools.product(range(16), range(layers)):
        chips[i, z] = Chip((int(place[i]) // 4, int(place[i]) % 4, z))
    shape = [{"data": 4 if len(axes) == 2 else 16, "fsdp": 4 if len(axes) == 2 else 16}.get(n, layers) for n in names]
    mesh = Mesh(chips.T.reshape(shape) if names[0] not in axes else chips.reshape(shape), names)
    order = ring_order(mesh, axes)
    assert sorted(order) == list(range(16))
    where = [chips[i, 0].coords for i in order]
    assert all(apart(where[i - 1], where[i]) == 1 for i in range(16))


def test_as_numbered_where_there_is_no_grid():
    assert ring_order(make_mesh({"data": 4}, jax.devices()[:4]), ("data",)) == [0, 1, 2, 3]
    odd = np.array([Chip((0, 0)), Chip((0, 1)), Chip((1, 0))], object)
    assert ring_order(Mesh(odd, ("data",)), ("data",)) == [0, 1, 2]
    slices = np.array([Chip((i // 2, i % 2), slice_index=i // 2) for i in (0, 3, 1, 2)], object)
    assert ring_order(Mesh(slices, ("data",)), ("data",)) == [0, 1, 2, 3]
