"""Every spelling of replica groups, against loops over coordinates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from glmv_jax.aot import groups

MESH = {"a": 2, "b": 3, "c": 4}


def along(*axes: str) -> list[list[int]]:
    """Groups over some axes of MESH, numbered row by row."""
    others = [range(n) if name not in axes else range(1) for name, n in MESH.items()]
    found = []
    for at in itertools.product(*others):
        inside = [range(MESH[name]) if name in axes else [i] for name, i in zip(MESH, at)]
        found.append([int(np.ravel_multi_index(place, list(MESH.values()))) for place in itertools.product(*inside)])
    return found


def rows(found: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(tuple(sorted(row)) for row in found.tolist())


@pytest.mark.parametrize(
    ("spelling", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15},{16,17,18,19},{20,21,22,23}}", "c"),
        ("replica_groups=[6,4]<=[24]", "c"),
        ("replica_groups=[12,2]<=[2,12]T(1,0)", "a"),
        ("replica_groups=[8,3]<=[2,3,4]T(0,2,1)", "b"),
        ("replica_groups=mesh['a'=2,'b'=3,'c'=4] {'c'}", "c"),
        ("replica_groups=mesh[a=2,b=3,c=4] {a,c}", "ac"),
        ("replica_groups=mesh['x'=6,'y'=4] {'x'}", "ab"),
        ("replica_groups=mesh['x'=4,'y'=6], device_ids=([6,4]T(1,0)) {'y'}", "ab"),
        ("replica_groups=mesh['x'=4,'y'=6], device_ids=([4,6]<=[6,4]T(1,0)) {'x'}", "c"),
        ("replica_groups=mesh['x'=2,'y'=12] {'y':(1)3}", "b"),
        ("replica_groups=mesh['x'=2,'y'=12] {'y':(3)4}", "c"),
    ],
)
def test_each_spelling_is_the_axes_it_stands_for(spelling, axes):
    found = groups.groups(f", channel_id=1, {spelling}, use_global_device_ids=true", 24)
    assert rows(found) == rows(np.array(along(*axes)))
    assert groups.axes_between(found, MESH) == tuple(axes)


def test_listed_device_ids_and_everybody():
    mesh = "replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}"
    assert rows(groups.groups(mesh, 4)) == [(0, 2), (1, 3)]
    for everybody in ("replica_groups={}", "replica_groups={{}}, to_apply=%add", "channel_id=3"):
        assert rows(groups.groups(everybody, 4)) == [(0, 1, 2, 3)]


@pytest.mark.parametrize(
    "spelling",
    ["replica_groups=<new>", "replica_groups={{0,1},{2}}", "replica_groups=mesh['x'=4] {'z'}",
     "replica_groups=mesh['x'=4], device_ids=(0,1) {'x'}"],
)  # fmt: skip
def test_what_is_not_understood_is_said(spelling):
    with pytest.raises(groups.Unparsed):
        groups.groups(spelling, 4)


def test_pairs_and_slices():
    ring = groups.pairs("channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, frontend_attributes={}")
    assert ring.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert groups.axes_between(ring, {"x": 4}) == ("x",) and groups.axes_between(ring[:1], {"x": 2, "y": 2}) == ("y",)
    assert groups.crosses(ring, (0, 0, 1, 1)) and not groups.crosses(ring[:1], (0, 0, 1, 1))
    with pytest.raises(groups.Unparsed):
        groups.pairs("source_target_pairs=[4,2]<=[8]")
