"""Rows to other devices along a mesh axis, as many to each as there are: an all-to-all of slices of any size.

On TPUs `ragged_all_to_all` sends the rows and nothing else. Elsewhere (XLA's CPU backend has no such thing) the rows
for each device are laid into a block as long as the longest can be, which an ordinary all-to-all sends. Both are
called inside shard_map.

A TPU sends what lies in one piece. Rows of a matrix do not, as tiles hold eight of each, and XLA copies them before and
behind; of [n, 8, D] it sends first indices as they lie.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.parallel import rules


class Way(NamedTuple):
    """Devices that send each other rows. axes: of the mesh, that they are numbered along; groups: numbers of those that
    do, all equally many; None for all of them together."""

    axes: str | tuple[str, ...]
    groups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """Inside shard_map: how many there are."""
        return jax.lax.axis_size(self.axes) if self.groups is None else len(self.groups[0])

    def me(self) -> jax.Array:
        """Inside shard_map: which of them a device is."""
        number = jax.lax.axis_index(self.axes)
        return number if self.groups is None else jnp.argsort(jnp.array(self.groups).reshape(-1))[number] % self.size()


class Slices(NamedTuple):
    """What this device sends to each of S others and gets of them: int32 [G], G / S slices a device, in their order.

    start, size: of a slice among the sender's rows; put: where its first row goes among the receiver's. got: the sizes
    of the slices that come, by sender. Slices of no rows may start and be put anywhere.
    """

    start: jax.Array
    size: jax.Array
    put: jax.Array
    got: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def exchange(
    x: jax.Array, there: Slices, back: Slices, axis: str | Way, rows: int, most: int, home: bool
) -> jax.Array:
    """[rows, ...]: what the devices along `axis` put here, or those of a way.

    Args:
      x: [R, ...], this device's rows. Its gradient is what `back` brings home.
      there, back: the way, and the way back of the same rows.
      rows: of the result.
      most: rows that one device sends another at most.
      home: whether this is the second way of rows that were sent out. Then rows that nobody put are zero; on the way
        out they may be anything, as nobody looks at them. The gradient goes the other way.
    """
    return ragged(x, there, back, axis, rows, home) if supported() else padded(x, there, axis, rows, most)


def _forward(x: jax.Array, there: Slices, back: Slices, axis: str | Way, rows: int, most: int, home: bool) -> tuple:
    return exchange(x, there, back, axis, rows, most, home), (there, back, len(x))


def _backward(axis: str | Way, rows: int, most: int, home: bool, saved: tuple, g: jax.Array) -> tuple:
    there, back, own = saved
    return exchange(g, back, there, axis, own, most, not home), None, None


exchange.defvjp(_forward, _backward)


def supported() -> bool:
    """Whether the ragged form is there: on TPUs from v4 on."""
    device = rules.device()
    return device.platform == "tpu" and not device.device_kind.startswith(("TPU v2", "TPU v3"))


def ragged(x: jax.Array, there: Slices, back: Slices, axis: str | Way, rows: int, home: bool) -> jax.Array:
    """The fast path. Rows come into memory as it was found: by the compiler's estimate zeros, in the layout that is
    sent, took 47 of the 117 ms of a layer of GLM-5's experts, forward and backward."""
    found = jax.lax.empty((rows, *x.shape[1:]), x.dtype)
    axes, groups = _way(axis)
    got = jax.lax.ragged_all_to_all(x, found, *there, axis_name=axes, axis_index_groups=groups)
    return jnp.where(jnp.expand_dims(put(back, rows), [*range(1, x.ndim)]), got, 0) if home else got


def _way(axis: str | Way) -> Way:
    return axis if isinstance(axis, Way) else Way(axis)


def put(back: Slices, rows: int) -> jax.Array:
    """[rows] bool: which rows there are, of those that the way back begins with."""
    at_R1 = jnp.arange(rows)[:, None]
    return ((at_R1 >= back.start) & (at_R1 < back.start + back.size)).any(1)


def padded(x: jax.Array, there: Slices, axis: str | Way, rows: int, most: int) -> jax.Array:
    """The twin."""
    way = _way(axis)
    S = way.size()
    send = lambda x: jax.lax.all_to_all(x, way.axes, 0, 0, tiled=True, axis_index_groups=way.groups)  # noqa: E731
    apart = lambda x: x.reshape(S, -1)  # noqa: E731
    from_SM = _rows_of(apart(there.start), apart(there.size), most, len(x))
    come_SM = send(jnp.take(x, from_SM, axis=0, mode="fill", fill_value=0))
    to_SM = _rows_of(apart(send(there.put)), apart(there.got), most, rows)
    # Numbers of rows are scattered, and the rows themselves gathered by them: XLA scatters one after the other.
    which = jnp.full(rows, S * most).at[to_SM.reshape(-1)].set(jnp.arange(S * most), mode="drop")
    return jnp.take(come_SM.reshape(S * most, *x.shape[1:]), which, axis=0, mode="fill", fill_value=0)


def _rows_of(start_SK: jax.Array, size_SK: jax.Array, most: int, none: int) -> jax.Array:
    """[S, most]: the rows of K slices one after the other, then `none`."""
    ends_SK = jnp.cumsum(size_SK, axis=1)
    at_M = jnp.arange(most)
    slice_SM = jax.vmap(lambda ends: jnp.searchsorted(ends, at_M, side="right"))(ends_SK)
    inside_SM = jnp.minimum(slice_SM, size_SK.shape[1] - 1)
    pick = lambda x_SK: jnp.take_along_axis(x_SK, inside_SM, axis=1)  # noqa: E731
    rows_SM = pick(start_SK) + at_M - pick(ends_SK - size_SK)
    return jnp.where(slice_SM < size_SK.shape[1], rows_SM, none)
