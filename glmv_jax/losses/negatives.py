"""What the negatives of the sigmoid loss add up to: sum of softplus(s z_i . w_j + b) over all pairs of unlike labels.

Three implementations of one function. `dense` is plain jnp: the oracle, and enough for one device. The other two keep
only features, scale and bias for the backward pass and compute logits anew there, a few rows at a time; texts come from
the other devices

    ring_bidir          in both directions round a ring, each hop while the device works on the hop before. A text takes
                        its gradient along, one hop behind it, and the gradient is sent home at the end.
    allgather_chunked   in one all-gather; gradients go home in one reduce-scatter. For meshes of hundreds of devices or
                        several slices, where few large messages beat many small ones.

so a device holds O(n E + chunk n) numbers in the ring, O(B E + chunk B) with the all-gather, for n = B / devices rows
of its own; never the n x B logits that autodiff of a dense form keeps.

Sources: open_clip `src/open_clip/loss.py` (the bidirectional ring, without the custom gradient) and big_vision
`_deprecated_contrastive.py`, whose authors dropped ppermute because autodiff keeps the texts of every hop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from glmv_jax.parallel.mesh import data_axes, data_shards
from glmv_jax.typing import UserError

IMPLEMENTATIONS = ("dense", "ring_bidir", "allgather_chunked")


class Negatives(NamedTuple):
    """softplus: [], the sum over pairs of unlike labels, the only part with a gradient.

    logits, pairs: [], the sum of their logits and their number. highest_B: [B], an image's highest logit among them.
    """

    softplus: jax.Array
    logits: jax.Array
    pairs: jax.Array
    highest_B: jax.Array


class _Texts(NamedTuple):
    """Texts that travel: features [M, E] in the wire's dtype and labels [M]."""

    features: jax.Array
    label: jax.Array


class _Grads(NamedTuple):
    """Of the sum of softplus, float32."""

    image: jax.Array
    text: jax.Array
    scale: jax.Array
    bias: jax.Array


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
    if not axes:
        raise UserError(f"loss impl={name!r} needs a mesh with a data or fsdp axis; use impl='dense' without one")
    forward, backward = (ring_forward, ring_backward) if name == "ring_bidir" else (gather_forward, gather_backward)
    return _distributed(forward, backward, mesh, axes, chunk, wire)


def dense(image_BE, text_ME, image_label_B, text_label_M, scale, bias) -> Negatives:
    """All logits at once."""
    logits_BM = scale * jnp.matmul(image_BE, text_ME.T, preferred_element_type=jnp.float32) + bias
    unlike_BM = image_label_B[:, None] != text_label_M[None, :]
    return _sums(logits_BM, unlike_BM)


# --- one device: its images against some texts, a few rows of logits at a time ----------------------------------------


def _sums(logits_CM: jax.Array, unlike_CM: jax.Array) -> Negatives:
    return Negatives(
        jnp.where(unlike_CM, jax.nn.softplus(logits_CM), 0.0).sum(),
        jnp.where(unlike_CM, logits_CM, 0.0).sum(),
        unlike_CM.sum(dtype=jnp.float32),
        jnp.where(unlike_CM, logits_CM, -jnp.inf).max(1),
    )


def _add(a: Negatives, b: Negatives) -> Negatives:
    return Negatives(a.softplus + b.softplus, a.logits + b.logits, a.pairs + b.pairs, jnp.maximum(a[3], b[3]))


def _cosines(image_CE: jax.Array, texts: _Texts) -> jax.Array:
    return jnp.matmul(image_CE.astype(texts.features.dtype), texts.features.T, preferred_element_type=jnp.float32)


def _block(image_nE, label_n, texts: _Texts, scale, bias, chunk: int) -> Negatives:
    """Negatives of own images and these texts; logits live `chunk` rows at a time."""

    def rows(total, part):
        image_CE, label_C = part
        got = _sums(scale * _cosines(image_CE, texts) + bias, label_C[:, None] != texts.label[None, :])
        return jax.tree.map(jnp.add, total, got[:3]), got.highest_B

    zero = jnp.zeros((), jnp.float32)
    total, highest = jax.lax.scan(rows, (zero, zero, zero), _rows((image_nE, label_n), chunk))
    return Negatives(*total, highest.reshape(-1))


def _block_grads(image_nE, label_n, texts: _Texts, scale, bias, chunk: int) -> _Grads:
    """Gradients of `_block(...).softplus`."""
    wire = texts.features.dtype

    def rows(carry, part):
        text_ME, scale_sum, bias_sum = carry
        image_CE, label_C = part
        cosine_CM = _cosines(image_CE, texts)
        unlike_CM = label_C[:, None] != texts.label[None, :]
        g_CM = jnp.where(unlike_CM, jax.nn.sigmoid(scale * cosine_CM + bias), 0.0)
        product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        text_ME += product(g_CM.astype(wire).T, image_CE.astype(wire))
        carry = text_ME, scale_sum + (g_CM * cosine_CM).sum(), bias_sum + g_CM.sum()
        return carry, product(g_CM.astype(wire), texts.features)

    zero = jnp.zeros((), jnp.float32)
    start = (jnp.zeros(texts.features.shape, jnp.float32), zero, zero)
    (text_ME, scale_sum, bias_sum), image = jax.lax.scan(rows, start, _rows((image_nE, label_n), chunk))
    return _Grads(scale * image.reshape(image_nE.shape), scale * text_ME, scale_sum, bias_sum)


def _rows(arrays: Any, chunk: int) -> Any:
    """[n, ...] -> [n / c, c, ...] for the largest c <= chunk that divides n."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    c = next(c for c in range(min(chunk, n), 0, -1) if n % c == 0)
    return jax.tree.map(lambda x: x.reshape(n // c, c, *x.shape[1:]), arrays)


# --- the ring ---------------------------------------------------------------------------------------------------------


def _shift(x: Any, axes: tuple[str, ...], size: int, by: int) -> Any:
    """Each device's arrays go to the device `by` places further."""
    perm = [(i, (i + by) % size) for i in range(size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axes, perm), x)


def ring_forward(image_nE, label_n, texts: _Texts, scale, bias, *, axes, size: int, chunk: int) -> Negatives:
    """Inside shard_map: this device's images against all texts.

    After k hops a device has the texts of its k-th neighbour on either side, so (size - 1) // 2 pairs of hops do; when
    the number of devices is even one more hop brings the texts from opposite. The next texts are always on their way
    while the ones before are worked on.
    """
    block = lambda t: _block(image_nE, label_n, t, scale, bias, chunk)  # noqa: E731
    shift = functools.partial(_shift, axes=axes, size=size)
    pairs = (size - 1) // 2
    if size == 1:
        return block(texts)
    right, left = shift(texts, by=1), shift(texts, by=-1)  # with two devices the same, and only one is used
    total = block(texts)

    def hop(carry, _):
        total, right, left = carry
        arriving = shift(right, by=1), shift(left, by=-1)
        return (_add(total, _add(block(right), block(left))), *arriving), None

    if pairs:
        (total, right, left), _ = jax.lax.scan(hop, (total, right, left), None, length=pairs - 1)
        opposite = shift(right, by=1)
        total = _add(total, _add(block(right), block(left)))
        right = opposite
    return _add(total, block(right)) if size % 2 == 0 else total


def ring_backward(image_nE, label_n, texts: _Texts, scale, bias, *, axes, size: int, chunk: int) -> _Grads:
    """Inside shard_map: gradients of own images and own texts, and this device's part of those of scale and bias.

    Texts go round once more. The gradient of a text that is k hops from home is added to, then sent after it while the
    next hop is worked on; at the end each is `pairs` (or one more) hops away and is sent home in one.
    """
    grads = lambda t: _block_grads(image_nE, label_n, t, scale, bias, chunk)  # noqa: E731
    shift = functools.partial(_shift, axes=axes, size=size)
    pairs = (size - 1) // 2
    if size == 1:
        return grads(texts)
    right, left = shift(texts, by=1), shift(texts, by=-1)
    own = grads(texts)
    image, s, b = own.image, own.scale, own.bias
    from_right, from_left = own.text, jnp.zeros_like(own.text)  # gradients of the texts that go right, and left

    def meet(sums, right, left, from_right, from_left):
        """Both gradients catch up with their texts, and get this device's part."""
        from_right, from_left = shift(from_right, by=1), shift(from_left, by=-1)
        one, two = grads(right), grads(left)
        ours = (one.image, one.scale, one.bias), (two.image, two.scale, two.bias)
        sums = jax.tree.map(lambda x, y, z: x + y + z, sums, *ours)
        return sums, from_right + one.text, from_left + two.text

    def hop(carry, _):
        sums, right, left, from_right, from_left = carry
        arriving = shift(right, by=1), shift(left, by=-1)
        sums, from_right, from_left = meet(sums, right, left, from_right, from_left)
        return (sums, *arriving, from_right, from_left), None

    sums = (image, s, b)
    if pairs:
        carry = (sums, right, left, from_right, from_left)
        (sums, right, left, from_right, from_left), _ = jax.lax.scan(hop, carry, None, length=pairs - 1)
        opposite = shift(right, by=1)
        sums, from_right, from_left = meet(sums, right, left, from_right, from_left)
        right = opposite
    away = pairs
    if size % 2 == 0:
        from_right = shift(from_right, by=1)
        last = grads(right)
        sums = jax.tree.map(jnp.add, sums, (last.image, last.scale, last.bias))
        from_right, away = from_right + last.text, pairs + 1
    text = shift(from_right, by=-away) + (shift(from_left, by=pairs) if pairs else 0.0)
    return _Grads(sums[0], text, sums[1], sums[2])


# --- the all-gather ---------------------------------------------------------------------------------------------------


def gather_forward(image_nE, label_n, texts: _Texts, scale, bias, *, axes, size: int, chunk: int) -> Negatives:
    """Inside shard_map: this device's images against all texts."""
    everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), texts)
    return _block(image_nE, label_n, everyone, scale, bias, max(1, chunk // size))


def gather_backward(image_nE, label_n, texts: _Texts, scale, bias, *, axes, size: int, chunk: int) -> _Grads:
    """Inside shard_map: gradients of own images and own texts, and this device's part of those of scale and bias."""
    everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), texts)
    grads = _block_grads(image_nE, label_n, everyone, scale, bias, max(1, chunk // size))
    return grads._replace(text=jax.lax.psum_scatter(grads.text, axes, tiled=True))


# --- around them: shard_map, and a gradient of our own ----------------------------------------------------------------


def _distributed(forward: Callable, backward: Callable, mesh: Mesh, axes: tuple[str, ...], chunk: int, wire: str):
    size = data_shards(mesh)
    rows, everywhere = P(axes), P()
    specs = (rows, rows, rows, rows, everywhere, everywhere)

    def local_forward(image, text, image_label, text_label, scale, bias):
        texts = _Texts(text.astype(wire), text_label)
        found = forward(image, image_label, texts, scale, bias, axes=axes, size=size, chunk=chunk)
        return Negatives(*jax.lax.psum(tuple(found[:3]), axes), found.highest_B)

    def local_backward(image, text, image_label, text_label, scale, bias):
        texts = _Texts(text.astype(wire), text_label)
        grads = backward(image, image_label, texts, scale, bias, axes=axes, size=size, chunk=chunk)
        return grads._replace(scale=jax.lax.psum(grads.scale, axes), bias=jax.lax.psum(grads.bias, axes))

    # check_vma off: nothing is differentiated through these, and the sums over devices are explicit.
    out = Negatives(everywhere, everywhere, everywhere, rows)
    run_forward = jax.shard_map(local_forward, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    out = _Grads(rows, rows, everywhere, everywhere)
    run_backward = jax.shard_map(local_backward, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)

    @jax.custom_vjp
    def negatives(image, text, image_label, text_label, scale, bias):
        return run_forward(image, text, image_label, text_label, scale, bias)

    def negatives_fwd(*args):
        return run_forward(*args), args

    def negatives_bwd(args, cotangent):
        image, text, *_ = args
        g = cotangent.softplus  # the other outputs are metrics
        grads = run_backward(*args)
        return ((g * grads.image).astype(image.dtype), (g * grads.text).astype(text.dtype), None, None,
                g * grads.scale, g * grads.bias)

    negatives.defvjp(negatives_fwd, negatives_bwd)

    def checked(image, text, *rest):
        for what, x in (("images", image), ("texts", text)):
            if x.shape[0] % size:
                raise UserError(f"sigmoid loss: {x.shape[0]} {what} do not divide over {size} devices")
        return negatives(image, text, *rest)

    return checked
