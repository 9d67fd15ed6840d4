"""The experts of a mixture at their tokens: on one device, or over a mesh with the tokens sent to them and back.

Outside the experts the mesh axis `expert` is one more axis of data: every device has rows of its own. Here each also
has E / S of the experts, S being the axis' size. It sorts its tokens' copies (a row is a token and one of its experts)
by expert, sends each to the device that has it with its weight, multiplies what it gets and sends the results home.
The weight is applied inside of an expert, before its last matrix: its gradient is known there, and the backward pass
makes no result anew. Nothing else crosses: an expert's matrices are gathered over `fsdp` in the dtype of the products,
their gradient is scattered back, and `tensor` splits their hidden width, whose halves of the result are summed once a
token.

No row is lost, and memory does not follow the worst case, in which every token wants the experts of one device: min(k,
E / S) of them, as they differ. The rows that a device is owed are numbered, by expert and then by sender, and it takes
a window of them at a time, `WINDOW` times the mean. With balanced experts the first window holds them all; else there
are as many more as the fullest device needs, each computed anew in the backward pass. Rows arrive sorted by expert,
ready for the grouped products.

Where slices, the rows of a device for an expert, are long, each is filled up to whole tiles of `TILE` rows: these lie
in a TPU's memory in one piece, and are sent as they lie. What fills is a token's copy of weight zero, which nothing
feels.

This is all by hand, in shard_map, also where only the batch is split: what the partitioner makes of a sort and of loops
over tiles is every row on every device, and a sum over devices for every tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from glmv_jax.kernels.exchange import Slices, exchange
from glmv_jax.kernels.grouped_matmul import grouped_matmul, plain
from glmv_jax.models.layers import gated
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.rules import entry_axes

WINDOW = 1.25  # rows a device takes at a time, over its share
TILE = 8  # rows of a tile in a TPU's memory
LONG = 16  # tiles of a slice on average: filling it up is a thirtieth more


class Experts(NamedTuple):
    """Matrices: gate, up [E, D, F], down [E, F, D]."""

    gate: Any
    up: Any
    down: Any


# Of `down` the hidden width is split, where that of `gate` and `up` is and then as their other side is.
_INTO = ("expert", "expert_embed", "mlp")
AXES = Experts(_INTO, _INTO, ("expert", "expert_mlp", None))


class Chosen(NamedTuple):
    """expert: int32 [..., k] of each token; weight: [..., k] float32; valid: [...] bool, which tokens there are."""

    expert: jax.Array
    weight: jax.Array
    valid: jax.Array


class Form(NamedTuple):
    """How a device computes its experts: see `apply`."""

    dense: bool
    limit: float | None


class Split(NamedTuple):
    """How the tokens of a device meet experts of others. axis, devices: the mesh axis that experts live on and its
    size; unit: rows are sent in whole ones of it; window: rows of a device at a time; most: that one sends another in
    it; windows: that there are at most; mesh: all its axes."""

    axis: str
    devices: int
    unit: int
    window: int
    most: int
    windows: int
    mesh: tuple[str, ...]


def apply(
    x_BTD: jax.Array, chosen: Chosen, experts: Experts, dense: bool = False, limit: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """(weighted sum of each token's experts [B, T, D] in x's dtype, tokens an expert [E] float32 of the whole batch).

    dense: every token times every matrix, for tests. limit: as `layers.SwiGLU`. Raises ValueError when the rules in
    force split `expert_mlp` another way than the head of this file says.
    """
    form = Form(dense, limit)
    if (found := rules_lib.active()) is None or found[0].size == 1:
        return _own(x_BTD, chosen, experts, None, form)
    mesh, rules = found
    free = set(mesh.axis_names) - set(jax.sharding.get_abstract_mesh().manual_axes)
    if not free:  # on a stage of one device
        return _own(x_BTD, chosen, experts, None, form)
    rows: Any = rules.spec(("batch", "length"), mesh)
    at = Experts(*(rules.spec(names, mesh) for names in AXES))
    parts, shared = entry_axes(at.gate[2]), entry_axes(at.down[1])
    if shared[: len(parts)] != parts:
        raise ValueError(f"rules split mlp over {parts} and expert_mlp over {shared}; the second begins as the first")
    owners = entry_axes(at.gate[0])
    if len(owners) > 1:
        raise ValueError(f"rules split experts over {owners}; tokens are sent along one axis")

    axis = owners[0] if owners and mesh.shape[owners[0]] > 1 else None

    def local(x: jax.Array, chosen: Chosen, experts: Experts) -> tuple:
        split = _split(axis, mesh.shape[axis], chosen, experts, free) if axis else None
        with jax.named_scope("dispatch"):
            gate, up = (_gathered(w, entry_axes(at.gate[1]), x.dtype) for w in experts[:2])
            down = _gathered(experts.down, shared[len(parts) :], x.dtype)
        out, load = _own(x, chosen, Experts(gate, up, down), split, form)
        with jax.named_scope("combine"):
            out = jax.lax.psum(out, parts) if parts else out
        spread = tuple(axis for entry in rows for axis in entry_axes(entry))
        return out, jax.lax.psum(load, spread) if spread else load

    mapped = jax.shard_map(
        local, mesh=mesh if free == set(mesh.axis_names) else None, in_specs=(rows, Chosen(rows, rows, rows), at),
        out_specs=(rows, P()), axis_names=free, check_vma=False,
    )  # fmt: skip
    return mapped(x_BTD, chosen, experts)


def _gathered(w: jax.Array, axes: tuple[str, ...], dtype: Any) -> jax.Array:
    """The second dimension whole. The gradient is summed and scattered in one go."""
    return jax.lax.all_gather(w.astype(dtype), axes, axis=1, tiled=True) if axes else w


def _split(axis: str, devices: int, chosen: Chosen, experts: Experts, mesh: set[str]) -> Split:
    """For the tokens and the experts of one device."""
    (*_, k), tokens, own = chosen.expert.shape, chosen.valid.size, len(experts.gate)
    unit = TILE if tokens * k >= LONG * TILE * own * devices and tokens * k % TILE == 0 else 1
    at_most = tokens * min(k, own) + own * (unit - 1)  # a token's experts are different ones
    at_most -= at_most % unit
    window = min(_whole_tiles(WINDOW * tokens * k), _whole_tiles(devices * at_most))
    windows = -(-devices * at_most // window)
    return Split(axis, devices, unit, window, min(at_most, window), windows, tuple(sorted(mesh)))


def _whole_tiles(rows: float) -> int:
    return int(-(-rows // 128)) * 128  # kernels on TPUs take no less


def _own(
    x_BTD: jax.Array, chosen: Chosen, experts: Experts, split: Split | None, form: Form
) -> tuple[jax.Array, jax.Array]:
    """Of this device's tokens. Rows of invalid ones come last and belong to none."""
    D, k = x_BTD.shape[-1], chosen.expert.shape[-1]
    E = len(experts.gate) * (split.devices if split else 1)
    with jax.named_scope("dispatch"):
        expert_C = jnp.where(chosen.valid[..., None], chosen.expert, E).reshape(-1)
        sizes_E = jnp.bincount(expert_C, length=E + 1)[:-1].astype(jnp.int32)
        filled_E, order_R, back_C = _sorted(expert_C, sizes_E, split.unit if split else 1)
        x_RD = _spread(x_BTD.reshape(-1, D), order_R, back_C, k)
        weight_R = _weights(chosen.weight.reshape(-1).astype(x_RD.dtype), order_R, back_C)
    if split is None:
        y_RD = _mlp(form, x_RD, weight_R, experts, filled_E)
    else:
        sizes_SE = jax.lax.all_gather(filled_E, split.axis)
        y_RD = _sent(split, form, x_RD, weight_R, experts, sizes_SE)
    with jax.named_scope("combine"):
        out_ND = _collect(y_RD, order_R, back_C, k)
    return out_ND.reshape(x_BTD.shape), jax.lax.stop_gradient(sizes_E.astype(jnp.float32))


def _sorted(expert_C: jax.Array, sizes_E: jax.Array, unit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Copies by expert, each expert's filled up to whole units: (rows an expert [E], the copy in each row [R], the row
    of each copy [C]). In rows that fill, numbers of copies that there are not."""
    E, C = len(sizes_E), len(expert_C)
    lacking_E = -sizes_E % unit
    if unit > 1:
        filling_EU = jnp.where(jnp.arange(unit - 1) < lacking_E[:, None], jnp.arange(E)[:, None], E)
        expert_C = jnp.append(expert_C, jnp.pad(filling_EU.reshape(-1), (0, E % unit), constant_values=E))
    order_R = jnp.argsort(expert_C, stable=True)
    return sizes_E + lacking_E, order_R, jnp.argsort(order_R)[:C]


@jax.named_scope("products")
def _mlp(
    form: Form, x_RD: jax.Array, weight_R: jax.Array, experts: Experts, sizes_E: jax.Array, **about: Any
) -> jax.Array:
    products: Any = plain if form.dense else functools.partial(grouped_matmul, **about)
    gate_RF, up_RF = products(x_RD, experts[:2], sizes_E)
    inside_RF = gated(gate_RF, up_RF, form.limit) * weight_R[:, None]
    return products(inside_RF, (experts.down,), sizes_E)[0]


# --- rows sent and brought back, a window at a time -------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sent(
    split: Split, form: Form, x_RD: jax.Array, weight_R: jax.Array, experts: Experts, sizes_SE: jax.Array
) -> jax.Array:
    """[R, D]: what the experts make of rows that are sorted by expert; sizes_SE: of each device, rows an expert."""
    return _forward(split, form, x_RD, weight_R, experts, sizes_SE)[0]


def _forward(
    split: Split, form: Form, x_RD: jax.Array, weight_R: jax.Array, experts: Experts, sizes_SE: jax.Array
) -> tuple:
    def more(n: jax.Array, y_RD: jax.Array) -> jax.Array:
        return y_RD + _window(split, form, n, sizes_SE, *given)

    given = x_RD, weight_R, experts
    y_RD, pull = jax.vjp(functools.partial(_window, split, form, 0, sizes_SE), *given)
    return _over_windows(split, sizes_SE, more, y_RD), (pull, given, sizes_SE)


def _backward(split: Split, form: Form, saved: tuple, g_RD: jax.Array) -> tuple:
    pull, given, sizes_SE = saved

    def more(n: jax.Array, grads: Any) -> Any:
        _, pull = jax.vjp(functools.partial(_window, split, form, n, sizes_SE), *given)
        return jax.tree.map(jnp.add, grads, pull(g_RD))

    return *_over_windows(split, sizes_SE, more, pull(g_RD)), None


_sent.defvjp(_forward, _backward)


def _over_windows(split: Split, sizes_SE: jax.Array, more: Any, value: Any) -> Any:
    """`value` after `more(n, value)` for every window behind the first that any device has rows for."""
    if split.windows == 1:
        return value
    owed = sizes_SE.reshape(split.devices, split.devices, -1).sum((0, 2)).max()
    # The same number everywhere: devices that do not exchange rows with each other may yet go through a loop together.
    windows = jax.lax.pmax(-(-owed // split.window), split.mesh)
    with jax.named_scope("seldom"):  # `aot.costs` counts it so
        return jax.lax.fori_loop(1, windows, more, value)


def _window(
    split: Split, form: Form, n: jax.Array | int, sizes_SE: jax.Array, x_RD: jax.Array, weight_R: jax.Array,
    experts: Experts,
) -> jax.Array:
    """[R, D]: as `_sent`, for the rows that are in window n of their experts' device; the others are zero."""
    unit = split.unit
    window, own, most = (rows // unit for rows in (split.window, len(x_RD), split.most))
    here = jax.lax.axis_index(split.axis)

    def send(x: jax.Array, there: Slices, back: Slices, rows: int, home: bool) -> jax.Array:
        return exchange(x, there, back, split.axis, rows, most, home)

    def send_rows(x_RD: jax.Array, there: Slices, back: Slices, rows: int, home: bool) -> jax.Array:
        tiles = x_RD.reshape(-1, unit, x_RD.shape[-1]) if unit > 1 else x_RD
        return send(tiles, there, back, rows, home).reshape(-1, x_RD.shape[-1])

    with jax.named_scope("dispatch"):
        there, back, mine_E = ways(sizes_SE // unit, split.devices, window, n, here)
        x_CD = send_rows(x_RD, there, back, window, False)
        weight_C = send(weight_R.reshape(-1, unit), there, back, window, False).reshape(-1)
    # Rows that nobody sent are not sent home.
    y_CD = _mlp(form, x_CD, weight_C, experts, mine_E * unit, expected=len(x_RD), rest=False)
    with jax.named_scope("combine"):
        return send_rows(y_CD, back, there, own, True)


def ways(
    sizes_SE: jax.Array, devices: int, window: int, n: jax.Array | int, me: jax.Array
) -> tuple[Slices, Slices, jax.Array]:
    """How the rows of window n go from device `me` to their experts' devices, and back; and how many of them each of
    its own experts has."""
    size_ES = sizes_SE.T
    begin_ES = jnp.cumsum(size_ES, axis=0) - size_ES  # among the sender's rows
    by_device = size_ES.reshape(devices, -1)
    owed_ES = (jnp.cumsum(by_device, axis=1) - by_device).reshape(size_ES.shape)  # among those its device is owed
    clip = lambda x: jnp.clip(x - n * window, 0, window)  # noqa: E731
    put_ES, end_ES = clip(owed_ES), clip(owed_ES + size_ES)
    now_ES = end_ES - put_ES
    start_ES = begin_ES + jnp.clip(n * window - owed_ES, 0, size_ES)
    mine = lambda x_ES: x_ES.reshape(devices, -1, devices)[me]  # noqa: E731  its experts, by sender
    received = lambda x_ES: mine(x_ES).T.reshape(-1)  # noqa: E731
    there = Slices(start_ES[:, me], now_ES[:, me], put_ES[:, me], received(now_ES))
    back = Slices(received(put_ES), received(now_ES), received(start_ES), now_ES[:, me])
    return there, back, mine(now_ES).sum(1)


# --- gathers with gathers as their gradients: XLA's own gradient of a gather is a scatter, one row at a time ----------
# Their indices are all within: with "fill" XLA would go through the rows once more to see.

_rows = functools.partial(jnp.take, axis=0, mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_ND: jax.Array, order_R: jax.Array, back_C: jax.Array, copies: int) -> jax.Array:
    """Row r is token order[r] // copies; a row that fills is any."""
    return _rows(x_ND, order_R // copies)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _collect(x_RD: jax.Array, order_R: jax.Array, back_C: jax.Array, copies: int) -> jax.Array:
    """Each token's rows, summed: `_spread` transposed, and it is the gradient of it, but in rows that fill, where that
    would be zero; of what they are multiplied with the weight is zero already."""
    each_AN = back_C.reshape(-1, copies).T  # a gather each: together they would be laid down before they are summed
    total: Any = sum(_rows(x_RD, back_N).astype(jnp.float32) for back_N in each_AN)
    return total.astype(x_RD.dtype)


_spread.defvjp(
    lambda x, order, back, copies: (_spread(x, order, back, copies), (order, back)),
    lambda copies, ways, g: (_collect(g, *ways, copies), None, None),
)
_collect.defvjp(
    lambda x, order, back, copies: (_collect(x, order, back, copies), (order, back)),
    lambda copies, ways, g: (_spread(g, *ways, copies), None, None),
)


@jax.custom_vjp
def _weights(weight_C: jax.Array, order_R: jax.Array, back_C: jax.Array) -> jax.Array:
    """Of rows; 0 of those that fill."""
    return jnp.where(order_R < len(weight_C), _rows(weight_C, order_R), 0)


_weights.defvjp(
    lambda weight, order, back: (_weights(weight, order, back), back),
    lambda back, g: (_rows(g, back), None, None),
)
