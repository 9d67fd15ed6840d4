"""Rows of an array to the devices that need them, by an all-to-all whose pieces differ in size, and back.

What goes where is known on the host before the step (`data.balancing.exchange`) and reaches the devices as one table of
counts. A device lays its rows out by destination and gets what it is sent by source, so the way back is the same
dispatch with the table transposed, and so is the gradient.

`home` is what stages 3 and 4 use: images are encoded in rows of the encoder's own, by all devices of the mesh, whose
matrices are then gathered over `context` and `tensor` too (a batch of images is more than they are), and their visual
tokens are sent to the devices that have the text. Devices exchange tokens with those of their own process, for this is
how far the loader of a process sees (`data.encoding`); what it decides are numbers, which go to the devices as arrays.

Two implementations with one result. "ragged" sends each piece as long as it is (`jax.lax.ragged_all_to_all`, which XLA
has for TPUs and GPUs); "padded" sends all pieces at the length of the longest one allowed, which runs anywhere. A
step that is compiled for TPUs with XLA's options `async` (`parallel.compiler`) can compute while patches travel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import DATA_AXES, data_axes, data_shards
from glmv_jax.typing import UserError

IMPLS = ("ragged", "padded")


class Way(NamedTuple):
    """axes: that devices are numbered along; groups: numbers of those that exchange rows, None for all."""

    axes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...] | None = None

    def me(self) -> jax.Array:
        """Inside shard_map: which of its group a device is."""
        number = jax.lax.axis_index(self.axes)
        return number if self.groups is None else jnp.argsort(jnp.array(self.groups).reshape(-1))[number] % self.size

    @property
    def size(self) -> int:
        return len(self.groups[0])


def dispatch(
    tree: Any, counts_RR: jax.Array, mesh: Mesh, axes: Sequence[str], *, rows: int, impl: str | None = None,
    longest: int | None = None,
) -> Any:  # fmt: skip
    """Arrays [R * n, ...], split over the R devices along `axes` -> arrays [R * rows, ...], split the same way.

    Args:
      tree: arrays; device s has counts[s, 0] rows for device 0, then counts[s, 1] for device 1, ..., then padding.
      counts_RR: [R, R] int, rows from a device (row) to a device (column).
      rows: what a device has room for. It gets the rows from device 0, then those from device 1, ..., then zeros.
      impl: of IMPLS; None: "ragged" on TPUs, "padded" elsewhere.
      longest: of "padded", the most rows a device sends to one other; None: all n.

    Counts that exceed n, `rows` or `longest` give rubbish without a word, so `check` them on the host. Floating arrays
    carry gradients, which travel back. Raises UserError for an unknown `impl`.
    """
    send = _sender(impl, mesh, longest)
    axes = tuple(axes)
    R = math.prod(mesh.shape[a] for a in axes)
    if counts_RR.shape != (R, R):
        raise UserError(f"dispatch: a table of {tuple(counts_RR.shape)} counts for {R} devices along {', '.join(axes)}")

    def local(counts: jax.Array, tree: Any) -> Any:
        return jax.tree.map(lambda x: _exchanged(x, counts, send, Way(axes), rows), tree)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(axes), check_vma=False)(counts_RR, tree)


def check(counts_RR: np.ndarray, n: int, rows: int, longest: int | None = None) -> None:
    """UserError when a dispatch of these counts does not fit; on the host, where the counts are made."""
    for what, most, have in (
        ("sends", counts_RR.sum(1).max(), n), ("gets", counts_RR.sum(0).max(), rows),
        ("sends to one other", counts_RR.max(), n if longest is None else longest),
    ):  # fmt: skip
        if most > have:
            raise UserError(f"dispatch: a device {what} {most} rows and has room for {have}; enlarge it")


def _sender(impl: str | None, mesh: Mesh, longest: int | None = None) -> Any:
    if impl is None:
        impl = "ragged" if mesh.devices.flat[0].platform == "tpu" else "padded"
    if impl not in IMPLS:
        raise UserError(f"dispatch impl={impl!r} is not known; use one of {', '.join(IMPLS)}")
    return _ragged if impl == "ragged" else functools.partial(_padded, longest=longest)


# What a device does with one array. Integers have no gradient and skip the rule.
def _exchanged(x: jax.Array, counts: jax.Array, send: Any, way: Way, rows: int) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return send(x, counts, way, rows)

    @jax.custom_vjp
    def run(x: jax.Array, counts: jax.Array) -> jax.Array:
        return send(x, counts, way, rows)

    def forward(x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run(x, counts), counts

    def backward(counts: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
        return send(g, counts.T, way, x.shape[0]), None

    run.defvjp(forward, backward)
    return run(x, counts)


def _offsets(counts_R: jax.Array) -> jax.Array:
    """Where each of the pieces of these lengths begins."""
    return jnp.cumsum(counts_R) - counts_R


def _ragged(x: jax.Array, counts: jax.Array, way: Way, rows: int) -> jax.Array:
    me = way.me()
    there_R = (jnp.cumsum(counts, axis=0) - counts)[me]  # where our pieces begin on each other device
    sizes = _offsets(counts[me]), counts[me], there_R, counts[:, me]
    # Rows come into memory as it was found, as in `kernels.exchange`: zeros in the layout that is sent cost more.
    found = jax.lax.empty((rows, *x.shape[1:]), x.dtype)
    got = jax.lax.ragged_all_to_all(x, found, *sizes, axis_name=way.axes, axis_index_groups=way.groups)
    there = jnp.arange(rows) < counts[:, me].sum()
    return jnp.where(there.reshape(-1, *[1] * (x.ndim - 1)), got, 0)


def _padded(x: jax.Array, counts: jax.Array, way: Way, rows: int, longest: int | None) -> jax.Array:
    me = way.me()
    K = min(x.shape[0], rows) if longest is None else longest
    k = jnp.arange(K)
    from_RK = _offsets(counts[me])[:, None] + k
    pieces = jnp.take(x, from_RK, axis=0, mode="clip")
    pieces = jax.lax.all_to_all(pieces, way.axes, 0, 0, axis_index_groups=way.groups)
    to_RK = jnp.where(k < counts[:, me][:, None], _offsets(counts[:, me])[:, None] + k, rows)
    return jnp.zeros((rows, *x.shape[1:]), x.dtype).at[to_RK].set(pieces, mode="drop")


# --- images encoded in rows of the encoder's own ----------------------------------------------------------------------

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
    if rules_lib.active() is None:
        yield
        return
    mesh, rules = rules_lib.active()
    for axis in SHARING:
        rules = rules.without(axis)
    with rules_lib.use(mesh, dataclasses.replace(rules, table={**rules.table, "batch": (*DATA_AXES, *SHARING)})):
        yield


def home(x_VMD: jax.Array, sent_VM: jax.Array, places: int) -> jax.Array:
    """[R, G, D]: visual tokens of the encoder's rows, on the R devices or groups of devices that have rows of text.

    G: `places` of each device of a group. sent_VM: as `data.encoding` says; what nobody is sent is zero. Gradients
    travel back. UserError when the devices of a process are no whole groups.
    """
    D = x_VMD.shape[-1]
    mesh = rules_lib.active_mesh()
    if mesh is None:
        at = jnp.where(sent_VM < 0, places, sent_VM).reshape(-1)
        return jnp.zeros((1, places, D), x_VMD.dtype).at[0, at].set(x_VMD.reshape(-1, D), mode="drop")
    way, send = Way(over(mesh), _of_processes(mesh)), _sender(None, mesh)
    G = mesh.size if way.groups is None else way.size

    def local(x_VMD: jax.Array, sent_VM: jax.Array) -> jax.Array:
        device_S = jnp.where(sent_VM < 0, G, sent_VM // places).reshape(-1)
        counts_G = jnp.bincount(device_S, length=G + 1)[:-1].astype(jnp.int32)
        counts_GG = jax.lax.all_gather(counts_G, way.axes, axis_index_groups=way.groups)
        x_SD = _ordered(x_VMD.reshape(-1, D), jnp.argsort(device_S, stable=True))
        return _exchanged(x_SD, counts_GG, send, way, places)

    where = P(way.axes)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(where, where), out_specs=where, check_vma=False)
    x_RGD = mapped(x_VMD, sent_VM).reshape(data_shards(mesh), -1, D)
    return rules_lib.constrain(x_RGD, "batch", None, "activation")


def _of_processes(mesh: Mesh) -> tuple[tuple[int, ...], ...] | None:
    """The devices of each process, numbered along `over`; None for one process."""
    axes = over(mesh)
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in axes]).reshape(-1)
    owner = np.array([device.process_index for device in devices])
    groups = tuple(tuple(map(int, np.flatnonzero(owner == one))) for one in np.unique(owner))
    share = mesh.size // data_shards(mesh)  # devices that share rows of text
    if any(len(group) != share * len({n // share for n in group}) for group in groups):
        raise UserError(f"data.dispatch: {share} devices of context x tensor share rows of text and are not all of one "
                        "process; make these axes smaller, or set data.dispatch.rows=0")  # fmt: skip
    return groups if len(groups) > 1 else None


@jax.custom_vjp
def _ordered(x_SD: jax.Array, order_S: jax.Array) -> jax.Array:
    """x[order], of a permutation, whose gradient is a gather too."""
    return jnp.take(x_SD, order_S, axis=0)


_ordered.defvjp(
    lambda x, order: (_ordered(x, order), order),
    lambda order, g: (jnp.take(g, jnp.argsort(order), axis=0), None),
)
