"""Rows split over the mesh axis `context`: which device has which positions, and what passes between them.

Of the N devices that share a row each has two of its 2N equal chunks: device d chunks d and 2N - 1 - d. Under a causal
mask a chunk from the front sees few keys and its partner from the back many, so that all devices have the same number
of pairs of query and key (Llama 3, arXiv 2407.21783, section 3.3.2, whose attention to gathered keys this is too).

What is one number a position (tokens, segments, rotary positions, weights: some 40 bytes of it) is whole on every
device, in the row's order. What is as wide as the model is split, and in the devices' order: from the embedding of the
tokens, where `dealt` changes the order, to the loss. The reason is what depends on the position: targets, and the token
that an MTP head embeds k positions ahead. These are found on whole rows by the lines that serve one device, and dealt
afterwards, so there is no second way to get them wrong. Attention needs no order: masks compare slots, which are dealt
as well, and rotation takes positions. The few wide arrays that have to move by some positions do it by `shifted`, which
passes on the edges of chunks. A layer gathers its keys and values (`gathered`), never queries, scores or results.

Patches of images are split too, but in order, as nothing is causal among them: the batch comes in so.

Outside of a step whose rules split "length", everything here leaves rows as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import UserError

AXIS = "context"


def size(mesh: Mesh, rules: rules_lib.Rules) -> int:
    """How many devices share a row."""
    return mesh.shape.get(AXIS, 1) if AXIS in rules_lib.entry_axes(rules.table.get("length")) else 1


def parts() -> int:
    """`size` of the step that is being traced; 1 outside of one."""
    active = rules_lib.active()
    return 1 if active is None else size(*active)


def check(length: int, n: int, what: str = "tokens", unit: int = 2) -> None:
    """UserError when rows of `length` do not divide into n parts of whole `unit`s (chunks, merge blocks)."""
    if n > 1 and length % (unit * n):
        fits = -(-length // (unit * n)) * unit * n
        raise UserError(f"rows of {length} {what} do not divide over {unit} x context={n}; try {fits}")


# --- order ------------------------------------------------------------------------------------------------------------


def order(length: int) -> np.ndarray:
    """The positions of a row in the devices' order, [T]; UserError when they do not divide."""
    n = parts()
    check(length, n)
    if n == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * n, -1)
    return np.stack([chunks[:n], chunks[: n - 1 : -1]], axis=1).reshape(-1)


def dealt(x_BT: jax.Array | None) -> Any:
    """Numbers [B, T, ...], whole and in the row's order -> split, in the devices' order. None stays None."""
    if x_BT is None or parts() == 1:
        return x_BT
    return _pinned(jnp.take(x_BT, order(x_BT.shape[1]), axis=1))


def overlapping(x_BT: jax.Array, more: int) -> jax.Array:
    """As `dealt`, and each chunk followed by the `more` numbers behind it in the row (the row's first ones, behind its
    end): [B, T + chunks * more]. What is looked up for these, `ahead` finds without anything passing."""
    T = x_BT.shape[1]
    first_N1 = order(T).reshape(_chunks(), -1)[:, :1]
    at = (first_N1 + np.arange(T // _chunks() + more)) % T
    return _pinned(jnp.take(x_BT, at.reshape(-1), axis=1))


def ahead(x_BX: jax.Array, by: int, more: int) -> jax.Array:
    """[B, T, ...]: what is `by` <= `more` positions behind each, of what was looked up for `overlapping(_, more)`."""
    B, X, *rest = x_BX.shape
    n, length = _chunks(), X // _chunks() - more
    return x_BX.reshape(B, n, length + more, *rest)[:, :, by : by + length].reshape(B, n * length, *rest)


def _chunks() -> int:
    return 1 if parts() == 1 else 2 * parts()


def _pinned(x_BT: jax.Array) -> jax.Array:
    return x_BT if parts() == 1 else rules_lib.constrain(x_BT, "batch", "length", *[None] * (x_BT.ndim - 2))


# --- between devices --------------------------------------------------------------------------------------------------


def spec(*names: str | None) -> P:
    """Where an array whose dimensions carry these logical names lives, for `per_device`."""
    mesh, rules = rules_lib.in_force()
    return rules.spec(names, mesh)


def per_device(fn: Callable, in_specs: Any, out_specs: Any, kernel: bool = False) -> Callable:
    """fn of each device's parts, as `jax.shard_map` in the step's mesh. UserError when a dimension does not divide.

    All mesh axes are manual: where only `context` is, the compiler gathers the batch before it gathers over `context`
    (seen in programs of jax 0.10). kernel: fn may call one that knows no `check_vma`.
    """
    mesh, _ = rules_lib.in_force()
    outside = set(jax.sharding.get_abstract_mesh().manual_axes)  # of a shard_map that this is traced in
    mapped = jax.shard_map(
        fn, mesh=None if outside else mesh, in_specs=in_specs, out_specs=out_specs,
        axis_names=set(mesh.axis_names) - outside, check_vma=not kernel,
    )  # fmt: skip

    def checked(*args: Any) -> Any:
        jax.tree.map(lambda where, part: jax.tree.map(lambda x: _check_divides(x, where, mesh), part), in_specs, args)
        return mapped(*args)

    return checked


def _check_divides(x: jax.Array, where: P, mesh: Mesh) -> None:
    for dim, axes in zip(x.shape, where):
        n = math.prod(mesh.shape[axis] for axis in rules_lib.entry_axes(axes))
        if dim % n:
            raise UserError(f"a dimension of {dim} (of {x.shape}) does not divide over {axes}={n}; use another mesh")


def gathered(x_BX: jax.Array) -> jax.Array:
    """Inside `per_device`: from each device's two chunks of a row the whole row, in its order."""
    x_BNX = jax.lax.all_gather(x_BX, AXIS, axis=1)
    B, N, X, *rest = x_BNX.shape
    x_BN2C = x_BNX.reshape(B, N, 2, X // 2, *rest)
    return jnp.concatenate([x_BN2C[:, :, 0], x_BN2C[:, ::-1, 1]], axis=1).reshape(B, N * X, *rest)


def shifted(x_BTD: jax.Array, by: int) -> jax.Array:
    """What is `by` positions behind each in the row (before it, where by < 0), and round the row's ends.

    Raises: UserError when a chunk is shorter than that.
    """
    if parts() == 1:
        return jnp.roll(x_BTD, -by, axis=1)
    if abs(by) > (chunk := x_BTD.shape[1] // _chunks()):
        raise UserError(f"chunks of {chunk} positions are too short to look {abs(by)} ahead; make rows longer")
    where = spec("batch", "length", None)
    return per_device(functools.partial(_shifted, by=by, n=parts()), (where,), where)(x_BTD) if by else x_BTD


def _shifted(x_BXD: jax.Array, by: int, n: int) -> jax.Array:
    """Inside `per_device`. Chunk c + 1 is on the next device where c is in the front half, else on the one before; the
    chunks in the middle are on one device, and so are the first and the last."""
    front, back = jnp.split(x_BXD, 2, axis=1)
    k, me = abs(by), jax.lax.axis_index(AXIS)
    edge = (lambda x: x[:, :k]) if by > 0 else (lambda x: x[:, -k:])
    down, up = [(d, d - 1) for d in range(1, n)], [(d, d + 1) for d in range(n - 1)]
    to_front, to_back, turn = (down, up, (n - 1, 0)) if by > 0 else (up, down, (0, n - 1))
    for_front = jnp.where(me == turn[0], edge(back), jax.lax.ppermute(edge(front), AXIS, to_front))
    for_back = jnp.where(me == turn[1], edge(front), jax.lax.ppermute(edge(back), AXIS, to_back))
    if by > 0:
        return jnp.concatenate([front[:, k:], for_front, back[:, k:], for_back], axis=1)
    return jnp.concatenate([for_front, front[:, :-k], for_back, back[:, :-k]], axis=1)


# --- chosen positions -------------------------------------------------------------------------------------------------


def chosen(is_chosen_BT: jax.Array, count: int) -> jax.Array:
    """[B, J]: where `is_chosen_BT` (whole rows) is true, on the device that has the position; J = N min(count, T / N).

    Each device's come in its order, and then others of its positions, which are not chosen.
    """
    B, T = is_chosen_BT.shape
    at_NX = order(T).reshape(parts(), -1)
    is_chosen_BNX = is_chosen_BT[:, at_NX]
    local_BNJ = jnp.argsort(~is_chosen_BNX, axis=2, stable=True)[:, :, :count]
    at_BJ = jnp.take_along_axis(jnp.asarray(at_NX)[None], local_BNJ, axis=2).reshape(B, -1)
    return _pinned(at_BJ)


def before(x_BTD: jax.Array, at_BJ: jax.Array, by: int) -> jax.Array:
    """[B, J, D]: x at the positions `by` before those of `chosen`; anything where there is none in the row."""
    n = parts()
    if n == 1:
        return jnp.take_along_axis(x_BTD, jnp.maximum(at_BJ - by, 0)[..., None], axis=1)

    def own(x_BXD: jax.Array, at_BJ: jax.Array) -> jax.Array:
        length, me = x_BXD.shape[1] // 2, jax.lax.axis_index(AXIS)
        front_BJ = at_BJ - me * length
        local_BJ = jnp.where(front_BJ < length, front_BJ, at_BJ - (2 * n - 2 - me) * length)
        return jnp.take_along_axis(x_BXD, local_BJ[..., None], axis=1)

    where = spec("batch", "length", None)
    return per_device(own, (where, spec("batch", "length")), where)(shifted(x_BTD, -by), at_BJ)
