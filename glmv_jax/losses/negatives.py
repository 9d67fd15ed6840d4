"""What the negatives of the sigmoid loss add up to: sum of softplus(s z_i . w_j + b) over all pairs of unlike labels.

Three implementations of one function. `dense` is plain jnp: the oracle, and enough for one device. In the other two the
images and texts of other devices come by, some at a time, and meet this device's own

    ring_bidir          in both directions round a ring, each hop while the device works on the hop before
    allgather_chunked   gathered from everywhere, a piece while the device works on the piece before. For several slices
                        and for rings whose hops are too small, where few large messages beat many small ones.

The gradient is taken on the way, when there will be one: own images meet the texts that come by, which gives the loss
and their gradient, and own texts meet the images. So every gradient is summed where it is needed, none travels, and the
backward pass only scales. Against sending texts round twice, the second time with their gradient in float32, this is as
many products, one round instead of two, and half the bytes: 4 n E a hop where 8 n E went.

A device holds O(n E + chunk n) numbers in the ring, O(n E + (E + chunk) GATHERED) with the all-gather, for n = B /
devices rows of its own: nothing grows with B but its share of it.

Sources: open_clip `src/open_clip/loss.py` (the bidirectional ring, without a gradient of its own) and big_vision
`_deprecated_contrastive.py`, whose authors dropped ppermute because autodiff keeps the texts of every hop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from glmv_jax.parallel.mesh import data_axes, data_shards
from glmv_jax.parallel.ring import ring_order
from glmv_jax.typing import UserError

IMPLEMENTATIONS = ("dense", "ring_bidir", "allgather_chunked")
GATHERED = 8192  # images (and their texts) of all devices that allgather_chunked has on a device at a time


class Negatives(NamedTuple):
    """softplus: [], the sum over pairs of unlike labels, the only part with a gradient.

    logits, pairs: [], the sum of their logits and their number. highest_B: [B], an image's highest logit among them.
    """

    softplus: jax.Array
    logits: jax.Array
    pairs: jax.Array
    highest_B: jax.Array


class _Side(NamedTuple):
    """Images or texts: features [m, E] in the wire's dtype and labels [m]."""

    features: jax.Array
    label: jax.Array


class _Rows(NamedTuple):
    """What meets: texts, and images where texts want a gradient."""

    image: _Side | None
    text: _Side


class _Grads(NamedTuple):
    """Of the sum of softplus, float32; those of image and text still without the factor `scale`."""

    image: jax.Array
    text: jax.Array
    scale: jax.Array
    bias: jax.Array


class _Found(NamedTuple):
    """What a device knows after some meetings: sums so far, highest logits so far, gradients so far (or none)."""

    sums: Negatives
    grads: _Grads | None


def implementation(
    name: str, mesh: Mesh | None, *, chunk: int = 1024, wire: str = "bfloat16"
) -> Callable[..., Negatives]:
    """(image [B, E], text [M, E], image_label [B], text_label [M], scale [], bias []) -> Negatives.

    M is a multiple of B; `mesh`, `chunk` and `wire` as in `sigmoid_loss`. Raises: UserError for an unknown name, a mesh
    that is missing or has no data axis.
    """
    if name not in IMPLEMENTATIONS:
        raise UserError(f"loss impl={name!r} is not known; choose from {', '.join(IMPLEMENTATIONS)}")
    if name == "dense":
        return dense
    axes = data_axes(mesh)
    if mesh is None or not axes:
        raise UserError(f"loss impl={name!r} needs a mesh with a data or fsdp axis; use impl='dense' without one")
    return _distributed(_ring if name == "ring_bidir" else _gather, mesh, axes, chunk, wire)


def dense(
    image_BE: jax.Array, text_ME: jax.Array, image_label_B: jax.Array, text_label_M: jax.Array, scale: jax.Array,
    bias: jax.Array,
) -> Negatives:  # fmt: skip
    """All logits at once."""
    cosine_BM = jnp.matmul(image_BE, text_ME.T, preferred_element_type=jnp.float32)
    return _sums(scale * cosine_BM + bias, image_label_B[:, None] != text_label_M[None, :])


# --- one device: its rows against some visitors, a few rows of logits at a time ---------------------------------------


def _sums(logits_CM: jax.Array, unlike_CM: jax.Array) -> Negatives:
    return Negatives(
        jnp.where(unlike_CM, jax.nn.softplus(logits_CM), 0.0).sum(),
        jnp.where(unlike_CM, logits_CM, 0.0).sum(),
        unlike_CM.sum(dtype=jnp.float32),
        jnp.where(unlike_CM, logits_CM, -jnp.inf).max(1),
    )


def _add(a: _Found, b: _Found) -> _Found:
    total = jax.tree.map(jnp.add, a, b)
    highest = jnp.maximum(a.sums.highest_B, b.sums.highest_B)
    return total._replace(sums=total.sums._replace(highest_B=highest))


def _meet(own: _Rows, visiting: _Rows, scale: jax.Array, bias: jax.Array, chunk: int) -> _Found:
    """Own images against the visiting texts and, where there are visiting images, own texts against those."""
    grads = visiting.image is not None
    assert own.image is not None

    def of_images(cosine_CM: jax.Array, unlike_CM: jax.Array) -> tuple:
        sums = _sums(scale * cosine_CM + bias, unlike_CM)
        if not grads:
            return sums[:3], sums.highest_B
        g_CM = _slope(cosine_CM, unlike_CM, scale, bias)
        slopes = (g_CM * cosine_CM).sum(), g_CM.sum()
        return (*sums[:3], *slopes), (sums.highest_B, _times(g_CM, visiting.text))

    def of_texts(cosine_CM: jax.Array, unlike_CM: jax.Array) -> tuple:
        assert visiting.image is not None
        return (), _times(_slope(cosine_CM, unlike_CM, scale, bias), visiting.image)

    total, rows = _by_rows(of_images, own.image, visiting.text, chunk)
    if visiting.image is None:
        return _Found(Negatives._make((*total, rows)), None)
    highest, image = rows
    _, text = _by_rows(of_texts, own.text, visiting.image, chunk)
    return _Found(Negatives._make((*total[:3], highest)), _Grads(image, text, *total[3:]))


def _by_rows(fn: Callable, own: _Side, visiting: _Side, chunk: int) -> tuple[Any, Any]:
    """fn(cosine [c, M], unlike [c, M]) -> (sums, rows), for c <= chunk own rows at a time; sums added, rows in order.

    c divides the number of own rows.
    """
    m = own.label.shape[0]
    c = next(c for c in range(min(chunk, m), 0, -1) if m % c == 0)

    def part(side: _Side) -> Any:
        cosine = jnp.matmul(side.features, visiting.features.T, preferred_element_type=jnp.float32)
        return fn(cosine, side.label[:, None] != visiting.label[None, :])

    if c == m:
        return part(own)
    parts = jax.tree.map(lambda x: x.reshape(m // c, c, *x.shape[1:]), own)
    zero, _ = _zeros(part, jax.tree.map(lambda x: x[0], parts))

    def step(total: Any, side: Any) -> tuple[Any, Any]:
        sums, rows = part(side)
        return jax.tree.map(jnp.add, total, sums), rows

    total, rows = jax.lax.scan(step, zero, parts)
    return total, jax.tree.map(lambda x: x.reshape(m, *x.shape[2:]), rows)


def _zeros(fn: Callable, arg: Any) -> Any:
    """Zeros in the shapes of fn(arg)."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, arg))


def _slope(cosine_CM: jax.Array, unlike_CM: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """d softplus / d logit."""
    return jnp.where(unlike_CM, jax.nn.sigmoid(scale * cosine_CM + bias), 0.0)


def _times(g_CM: jax.Array, visiting: _Side) -> jax.Array:
    features = visiting.features
    return jnp.matmul(g_CM.astype(features.dtype), features, preferred_element_type=jnp.float32)


# --- who comes by, inside shard_map -----------------------------------------------------------------------------------

Meet = Callable[[_Rows], _Found]


def _ring(meet: Meet, own: _Rows, axes: tuple[str, ...], order: Sequence[int]) -> _Found:
    """This device's rows and all others', that travel round the ring `order`.

    After k hops a device has the rows of its k-th neighbour on either side, so (size - 1) // 2 pairs of hops do; when
    the number of devices is even one more hop brings those from opposite. The next rows are always on their way while
    the ones before are worked on.
    """

    size = len(order)

    @jax.named_scope("ring")
    def shift(rows: _Rows, by: int) -> _Rows:
        perm = [(order[i], order[(i + by) % size]) for i in range(size)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axes, perm), rows)

    if size == 1:
        return meet(own)
    right, left = shift(own, 1), shift(own, -1)  # with two devices the same, and only one is used
    found = meet(own)

    def hop(carry: tuple, _: Any) -> tuple[Any, Any]:
        found, right, left = carry
        arriving = shift(right, 1), shift(left, -1)
        return (_add(_add(found, meet(right)), meet(left)), *arriving), None

    pairs = (size - 1) // 2
    if pairs:
        (found, right, left), _ = jax.lax.scan(hop, (found, right, left), None, length=pairs - 1)
        opposite = shift(right, 1)
        found = _add(_add(found, meet(right)), meet(left))
        right = opposite
    return _add(found, meet(right)) if size % 2 == 0 else found


def _gather(meet: Meet, own: _Rows, axes: tuple[str, ...], order: Sequence[int]) -> _Found:
    """This device's rows and everybody's, gathered a piece at a time: the next while the one before is worked on."""
    n = jax.tree.leaves(own)[0].shape[0]
    fits = lambda p: n % p == 0 and (n // p * len(order) <= GATHERED or p == n)  # noqa: E731
    pieces = next(p for p in range(1, n + 1) if fits(p))
    parts = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), own)
    part = lambda i: jax.tree.map(lambda x: x[i], parts)  # noqa: E731

    @jax.named_scope("ring")
    def everyone(rows: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), rows)

    here = everyone(part(0))
    if pieces == 1:
        return meet(here)

    def piece(carry: tuple, rows: Any) -> tuple[Any, Any]:
        found, here = carry
        arriving = everyone(rows)
        return (_add(found, meet(here)), arriving), None

    nothing = _zeros(meet, here)
    nothing = nothing._replace(sums=nothing.sums._replace(highest_B=nothing.sums.highest_B - jnp.inf))
    rest = jax.tree.map(lambda x: x[1:], parts)
    (found, here), _ = jax.lax.scan(piece, (nothing, here), rest)
    return _add(found, meet(here))


# --- around them: shard_map, and a gradient of our own ----------------------------------------------------------------


def _distributed(visit: Callable, mesh: Mesh, axes: tuple[str, ...], chunk: int, wire: str) -> Callable[..., Negatives]:
    size, order = data_shards(mesh), ring_order(mesh, axes)
    rows, everywhere = P(axes), P()

    def local(
        image: jax.Array, text: jax.Array, image_label: jax.Array, text_label: jax.Array, scale: jax.Array,
        bias: jax.Array, *, grads: bool,
    ) -> Any:  # fmt: skip
        own = _Rows(_Side(image.astype(wire), image_label), _Side(text.astype(wire), text_label))
        meet = lambda visiting: _meet(own, visiting, scale, bias, chunk)  # noqa: E731
        sums, slopes = visit(meet, own if grads else own._replace(image=None), axes, order)
        sums = Negatives._make((*jax.lax.psum(tuple(sums[:3]), axes), sums.highest_B))
        if not grads:
            return sums
        both = jax.lax.psum((slopes.scale, slopes.bias), axes)
        return sums, _Grads((scale * slopes.image).astype(image.dtype), (scale * slopes.text).astype(text.dtype), *both)

    def run(*args: Any, grads: bool) -> Any:
        out: Any = Negatives._make((everywhere, everywhere, everywhere, rows))
        out = (out, _Grads._make((rows, rows, everywhere, everywhere))) if grads else out
        specs = (rows, rows, rows, rows, everywhere, everywhere)
        # check_vma off: nothing is differentiated through this, and the sums over devices are explicit.
        return jax.shard_map(functools.partial(local, grads=grads), mesh=mesh, in_specs=specs, out_specs=out,
                             check_vma=False)(*args)  # fmt: skip

    @jax.custom_vjp
    def negatives(*args: Any) -> Any:
        return run(*args, grads=False)

    def backward(grads: _Grads, cotangent: Negatives) -> tuple:
        g = cotangent.softplus  # the other outputs are metrics
        image, text, scale, bias = ((g * x).astype(x.dtype) for x in grads)
        return image, text, None, None, scale, bias

    negatives.defvjp(functools.partial(run, grads=True), backward)

    def checked(image: jax.Array, text: jax.Array, *rest: Any) -> Any:
        for what, x in (("images", image), ("texts", text)):
            if x.shape[0] % size:
                raise UserError(f"sigmoid loss: {x.shape[0]} {what} do not divide over {size} devices")
        return negatives(image, text, *rest)

    return checked
