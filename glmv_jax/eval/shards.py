"""Rows of feature matrices over the data axes of a mesh, for evaluators that never hold a whole matrix of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib


def one_device() -> Mesh:
    """The mesh of an evaluator that is given none."""
    return mesh_lib.make_mesh({"data": 1}, jax.local_devices()[:1])


def split_rows(mesh: Mesh, block: int, *arrays: np.ndarray, fill: float = 0) -> list[Any]:
    """The arrays, the same on every host, with their rows split over the data axes of `mesh`.

    Each is filled up with `fill` so that every shard has the same whole number of blocks of `block` rows; the block
    is made smaller for few rows. Returns the arrays, and last the number of rows in a block.
    """
    shards, count = mesh_lib.data_shards(mesh), len(arrays[0])
    a_shard = -(-count // shards)
    block = min(block, max(1, a_shard))
    total = -(-a_shard // block) * block * shards
    sharding = rules_lib.batch_sharding(mesh)
    out: list[Any] = []
    for array in arrays:
        padded = np.full((total, *array.shape[1:]), fill, array.dtype)
        padded[:count] = array
        out.append(jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__))
    return [*out, block]


def whole(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """The array on every device of `mesh`."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec()), lambda at: array[at])


def map_rows(
    function: Callable[..., Any], mesh: Mesh, block: int, split: Sequence[jax.Array], whole: Sequence[jax.Array] = ()
) -> Any:
    """Under jit: `function(*blocks of split, *whole)` for block after block of each device's rows, on every device.

    split: arrays as `split_rows` made them. Returns what the function does, with the rows of all blocks, everywhere.
    """
    rows, everywhere = rows_spec(mesh), PartitionSpec()

    def local(split: Sequence[jax.Array], whole: Sequence[jax.Array]) -> Any:
        blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), tuple(split))
        out = jax.lax.map(lambda some: function(*some, *whole), blocks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, everywhere), out_specs=rows, check_vma=False)
    return jax.lax.with_sharding_constraint(mapped(tuple(split), tuple(whole)), NamedSharding(mesh, everywhere))


def rows_spec(mesh: Mesh) -> PartitionSpec:
    """Rows over the data axes, the rest whole."""
    return rules_lib.batch_sharding(mesh).spec


def unit(x_NE: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float64, as float32."""
    x = np.asarray(x_NE, np.float64)
    return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def scores(a_NE: jax.Array, b_ME: jax.Array) -> jax.Array:
    """[N, M] inner products in float32, also where matrices are multiplied in less by default."""
    return jnp.matmul(a_NE, b_ME.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
