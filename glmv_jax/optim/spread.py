"""Orthogonalisation over a mesh: each matrix whole on one device, each device with its share of the matrices.

Newton-Schulz multiplies a matrix with itself fifteen times. Replicated, every device does all of it; on matrices that
are split over devices each product communicates. So matrices of one shape are put into one stack, whatever layer or
tower they come from, and that stack changes hands: from split by rows or columns, as parameters live, to split by
matrix, and back. That is two all-to-alls a stack. Where parameters are replicated a device takes its part of the stack,
and the results are gathered; what splits a stack itself, as experts are, keeps doing so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from glmv_jax.parallel.rules import entry_axes

Axes = tuple[str, ...]


class Split(NamedTuple):
    """The mesh axes that the rows and the columns of a matrix are split over, and the stack it is of."""

    rows: Axes = ()
    columns: Axes = ()
    stack: Axes = ()


def split_of(spec: P, ndim: int, mesh: Mesh | AbstractMesh) -> Split:
    """Of an array [..., I, O]; axes of one device are left out."""
    entries = (*spec, *[None] * (ndim - len(spec)))
    axes = [tuple(a for a in entry_axes(entry) if mesh.shape[a] > 1) for entry in entries]
    return Split(axes[-2], axes[-1], tuple(a for names in axes[:-2] for a in names))


def spread(
    fn: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array], specs: Sequence[P], mesh: Mesh | AbstractMesh
) -> list[jax.Array]:
    """[fn(x) for x in arrays], each matrix on one device.

    Args:
      fn: [S, I, O] -> [S, I, O], matrix by matrix. It commutes with a transposition and with any reordering of rows and
        of columns, and leaves zeros zero (the orthogonal factor does).
      arrays: [..., I, O], stacks of matrices.
      specs: where they live.

    Returns: arrays of the same shapes, split as before.
    """
    splits = [split_of(spec, x.ndim, mesh) for x, spec in zip(arrays, specs)]
    kinds, flips = zip(*(_kind(x.shape[-2:], split) for x, split in zip(arrays, splits)))

    def local(*pieces: jax.Array) -> list[jax.Array]:
        done = list(pieces)
        for kind in dict.fromkeys(kinds):
            members = [i for i, k in enumerate(kinds) if k == kind]
            ours = [pieces[i].reshape(-1, *pieces[i].shape[-2:]) for i in members]
            ours = [x.mT if flips[i] else x for i, x in zip(members, ours)]
            found = _by_matrix(fn, jnp.concatenate(ours), kind[1], mesh)
            for i, x in zip(members, jnp.split(found, _ends(ours))):
                done[i] = (x.mT if flips[i] else x).reshape(pieces[i].shape)
        return done

    return jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=list(specs), check_vma=False)(*arrays)


def _by_matrix(fn: Callable, x_Sio: jax.Array, split: Split, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Inside shard_map: this device's piece of a stack -> the same piece of fn(stack)."""
    axes = [a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in split.stack]
    S = x_Sio.shape[0]
    x = jnp.pad(x_Sio, ((0, -S % math.prod(mesh.shape[a] for a in axes)), (0, 0), (0, 0)))
    # XLA's CPU backend (jax 0.10) would send the stack's parts as they were before they were stacked, transposed ones
    # in another layout, and then refuse its own program.
    x = jax.lax.optimization_barrier(x)
    dimension = dict.fromkeys(split.rows, 1) | dict.fromkeys(split.columns, 2)
    for a in axes:
        if a in dimension:
            x = jax.lax.all_to_all(x, a, split_axis=0, concat_axis=dimension[a], tiled=True)
        else:
            mine = x.shape[0] // mesh.shape[a]
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(a) * mine, mine)
    x = fn(x)
    for a in reversed(axes):
        if a in dimension:
            x = jax.lax.all_to_all(x, a, split_axis=dimension[a], concat_axis=0, tiled=True)
        else:
            x = jax.lax.all_gather(x, a, tiled=True)
    return x[:S]


def _kind(shape: tuple[int, ...], split: Split) -> tuple[tuple[tuple[int, int], Split], bool]:
    """What matrices of one stack have in common, and whether this one is transposed to have it.

    All are wide, so that matrices that read and that write the residual stream meet; of square ones the side that is
    split more stands in front, for the same reason.
    """
    rows, columns = shape
    flip = rows > columns or (rows == columns and len(split.rows) < len(split.columns))
    if flip:
        rows, columns, split = columns, rows, Split(split.columns, split.rows, split.stack)
    return ((rows, columns), split), flip


def _ends(arrays: Sequence[jax.Array]) -> list[int]:
    """Where to cut their concatenation."""
    lengths = [x.shape[0] for x in arrays]
    return [sum(lengths[: n + 1]) for n in range(len(lengths) - 1)]
