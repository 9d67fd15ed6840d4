"""Which devices take part in a collective: the spellings of `replica_groups`, and the mesh axes behind them.

    {{0,1},{2,3}}                                 lists; {} is everybody
    [2,4]<=[4,2]T(1,0)                            the numbers 0, 1, ... in that shape, turned, and cut into rows
    mesh['a'=2,'b'=4] {'b'}                       the named axes of a mesh that is numbered row by row
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(1)2}   of one numbered otherwise; of an axis only a part

Numbers are partitions: positions in the flattened mesh that the program was compiled for.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_LISTS = re.compile(r"replica_groups=\{((?:\{[\d, ]*\}[, ]*)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=@?mesh\[([^\]]*)\](?:,? device_ids=\(([^{]*)\))?,? *\{([^}]*)\}")
_AXIS = re.compile(r"'?([\w.]+)'?=(\d+)")
_PART = re.compile(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?$")
_ORDER = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}\}")


class Unparsed(ValueError):
    """A spelling that is not known: its bytes would be counted wrong."""


@functools.lru_cache(maxsize=4096)
def groups(attributes: str, partitions: int) -> np.ndarray:
    """[groups, members] of a collective. Raises: Unparsed."""
    if found := _LISTS.search(attributes):
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", found[1])]
        if not rows:
            return np.arange(partitions)[None]
        if len({len(row) for row in rows}) > 1:
            raise Unparsed(f"replica groups of several sizes: {found[0][:200]}")
        return np.array(rows)
    if found := _IOTA.search(attributes):
        return _iota(*found.groups())
    if found := _MESH.search(attributes):
        return _of_mesh(*found.groups())
    if "replica_groups" not in attributes:
        return np.arange(partitions)[None]
    raise Unparsed(f"replica groups are not understood: {attributes[attributes.index('replica_groups') :][:200]}")


def _iota(dims: str, reshape: str, transpose: str | None) -> np.ndarray:
    shape = _numbers(reshape)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(_numbers(transpose)) if transpose else numbers).reshape(_numbers(dims))


def _of_mesh(axes: str, order: str | None, along: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    numbers = _ordered(order, math.prod(sizes.values())).reshape(list(sizes.values()))
    # Every axis as (before, part, after), so that a part of an axis is a dimension of its own.
    cuts, taken = {name: (1, 1, size) for name, size in sizes.items()}, []
    for text in filter(None, (part.strip() for part in along.split(","))):
        part = _PART.match(text)
        if not part or part[1] not in sizes or part[1] in taken:
            raise Unparsed(f"replica groups along {along!r} of a mesh {axes!r}")
        size = sizes[part[1]]
        before, length = (int(part[2]), int(part[3])) if part[2] else (1, size)
        cuts[part[1]] = (before, length, size // before // length)
        taken.append(part[1])
    split = numbers.reshape([n for cut in cuts.values() for n in cut])
    inner = [3 * list(cuts).index(name) + 1 for name in taken]
    members = math.prod(split.shape[i] for i in inner)
    outer = [i for i in range(split.ndim) if i not in inner]
    return split.transpose(outer + inner).reshape(-1, members)


def _ordered(order: str | None, count: int) -> np.ndarray:
    if order is None:
        return np.arange(count)
    if found := _ORDER.search(order):
        dims, reshape, transpose = found.groups()
        # In short [4,2]T(1,0): what is turned is numbered row by row.
        return _iota(str(count), reshape or dims, transpose)
    numbers = [int(n) for n in re.findall(r"\d+", order)]
    if len(numbers) != count:
        raise Unparsed(f"device_ids=({order[:200]})")
    return np.array(numbers)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


@functools.lru_cache(maxsize=4096)
def pairs(attributes: str) -> np.ndarray:
    """[pairs, 2] of a collective permute: who sends to whom. Raises: Unparsed."""
    found = _PAIRS.search(attributes)
    numbers = re.findall(r"\d+", found[1]) if found else []
    if len(numbers) < 2:
        raise Unparsed(f"source_target_pairs are not understood: {attributes[:200]}")
    return np.array(numbers, int).reshape(-1, 2)


def axes_between(members: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which members of a row differ, in any row; members: [rows, n]."""
    places = np.array(np.unravel_index(members, list(mesh.values())))  # [axes, rows, n]
    differs = (places != places[:, :, :1]).any((1, 2))
    return tuple(itertools.compress(mesh, differs))


def crosses(members: np.ndarray, slice_of: Sequence[int]) -> bool:
    """Whether members of any row are in different slices; slice_of: of each partition."""
    where = np.asarray(slice_of)[members]
    return bool((where != where[:, :1]).any())
