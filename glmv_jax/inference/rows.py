"""Rows of a cache that lives on a mesh: which entries of its leaves are theirs, taken out, put back, pinned.

The rows are split over the D data shards of a mesh, equal runs of them each. What concerns some rows is done to as many
of each shard, and nothing passes between shards. Heads may be split too (`parallel.caches`): then each of their H parts
has those rows once more, with its own heads, and the entries of a leaf are in D * H runs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax.parallel import caches
from glmv_jax.parallel.mesh import data_shards
from glmv_jax.parallel.rules import Rules, preset


class _At(NamedTuple):
    """Of a leaf. axis: that of its rows, one after the other; runs: that they are in, see the file's head; own: entries
    of a row in one of them, its heads."""

    axis: int
    own: int
    runs: int


class Rows:
    """Of caches with these shapes for one row and for two, placed by these rules (None: only rows are split).

    Raises: UserError for heads of keys that do not divide.
    """

    def __init__(self, one: dict, two: dict, mesh: Mesh | None, rules: Rules | None) -> None:
        self.mesh, self.shards = mesh, data_shards(mesh)
        self._rules = rules or preset("data")
        self._at = jax.tree.map(self._place, one, two)

    def _place(self, one: Any, two: Any) -> _At:
        axis = next(i for i, n in enumerate(one.shape) if n != two.shape[i])
        heads, parts = one.shape[axis], 1
        if heads > 1 and self.mesh is not None:
            parts = caches.parts((self.mesh, self._rules))
            caches.check(heads, parts)
        return _At(axis, heads // parts, self.shards * parts)

    def take(self, cache: dict, row_DL: jax.Array) -> dict:
        """L rows of each shard, as a cache of D * L rows."""

        def take(x: jax.Array, at: _At) -> jax.Array:
            cut = lambda x, row: jax.lax.dynamic_slice_in_dim(x, row * at.own, at.own, at.axis)  # noqa: E731
            of_run = jax.vmap(jax.vmap(cut, (None, 0), at.axis), (at.axis, 0), at.axis)
            rows = of_run(_apart(x, at.axis, at.runs), self._by_run(row_DL, at))
            return _merged(_merged(rows, at.axis), at.axis)

        return jax.tree.map(take, cache, self._at)

    def put(self, cache: dict, rows: dict, row_D1: jax.Array) -> dict:
        """The cache with these rows in place of one of each shard."""

        def put(x: jax.Array, new: jax.Array, at: _At) -> jax.Array:
            x, new = (_apart(x, at.axis, at.runs) for x in (x, new))
            write = lambda x, new, row: jax.lax.dynamic_update_slice_in_dim(x, new, row * at.own, at.axis)  # noqa: E731
            written = jax.vmap(write, (at.axis, at.axis, 0), at.axis)(x, new, self._by_run(row_D1, at)[:, 0])
            return _merged(written, at.axis)

        return jax.tree.map(put, cache, rows, self._at)

    def of_lane(self, rows: dict, lane: jax.Array, lanes: int) -> dict:
        """Of `lanes` rows of each shard those of one lane."""

        def pick(x: jax.Array, at: _At) -> jax.Array:
            x = _apart(_apart(x, at.axis, at.runs), at.axis + 1, lanes)
            return _merged(jax.lax.dynamic_index_in_dim(x, lane, at.axis + 1, keepdims=False), at.axis)

        return jax.tree.map(pick, rows, self._at)

    def where(self, is_B: jax.Array, rows: dict, others: dict) -> dict:
        """Of B rows, one of each shard or without heads, these where it is true, else the others."""

        def pick(x: jax.Array, other: jax.Array, at: _At) -> jax.Array:
            repeated = jnp.repeat(is_B, x.shape[at.axis] // len(is_B))
            return jnp.where(repeated.reshape(*[1] * at.axis, -1, *[1] * (x.ndim - at.axis - 1)), x, other)

        return jax.tree.map(pick, rows, others, self._at)

    def pinned(self, cache: dict) -> dict:
        """Rows over the data shards, and heads where the rules have them."""
        if (mesh := self.mesh) is None:
            return cache
        of_rows, of_heads = (caches.spec(mesh, self._rules, heads) for heads in (False, True))

        def pin(x: jax.Array, at: _At) -> jax.Array:
            spec = PartitionSpec(*[None] * at.axis, *(of_heads if at.runs > self.shards else of_rows))
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        return jax.tree.map(pin, cache, self._at)

    def _by_run(self, row_DL: jax.Array, at: _At) -> jax.Array:
        """The same rows for every part of the heads."""
        return jnp.repeat(row_DL, at.runs // self.shards, axis=0)


def _apart(x: jax.Array, axis: int, parts: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])


def _merged(x: jax.Array, axis: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], math.prod(x.shape[axis : axis + 2]), *x.shape[axis + 2 :])
