"""Cross-entropy through the output head without its logits: some tokens at a time, and their gradient at once.

Logits [B, T, V] and their gradient are the largest arrays of a step. Here a scan makes those of one chunk of tokens,
takes from them what the loss and its metrics need, and adds up the gradient of the hidden states and of the head on the
way (as Liger-Kernel does, arXiv 2410.10989, section 3.2). The loss being a weighted sum, the backward pass only has to
scale it. So nothing is computed twice, where rematerialisation would pay one more product with the head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib

CHUNK = 1024  # tokens at a time on a device: 0.25 GB of logits where V = 59,392


class HeadLoss(NamedTuple):
    """total: scalar, sum(weight * (nll + z_loss * logsumexp^2)), all that has a gradient. nll_BT: -log p(target),
    unweighted; said_BT: the most probable token."""

    total: jax.Array
    nll_BT: jax.Array
    said_BT: jax.Array


def head_loss(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    chunk: int = CHUNK,
    z_loss: float = 0.0,
) -> HeadLoss:
    """`cross_entropy` of hidden @ head, the logits of at most `chunk` tokens a device being there at a time.

    Args:
      hidden_BTD: [B, T, D], normed, in the dtype of the products with the head; logits and their sums are float32.
      head_DV: [D, V], as the parameter is: its gradient is summed in float32.
      targets_BT: [B, T] int in [0, V); anything where the weight is 0.
      weight_BT: [B, T] float, divided by the sum of weights where a mean is wanted. It is data, without a gradient.
      chunk: 0 for all tokens at once.
      z_loss: as in `cross_entropy`.

    Within `parallel.rules.use` each device cuts its own rows into chunks, and the head may be split over its columns.
    """
    B, T, D = hidden_BTD.shape
    shards = mesh_lib.data_shards(rules_lib.active_mesh())
    S = shards if B % shards == 0 else 1
    own = B // S * T
    n = max(1, -(-own // chunk)) if chunk else 1
    size = -(-own // n)

    def cut(x_BT: jax.Array) -> jax.Array:
        """[B, T, ...] -> [n, S, size, ...]; the last chunk is filled up with zeros."""
        x = x_BT.reshape(S, own, *x_BT.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, n * size - own), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(S, n, size, *x.shape[2:]), 1, 0)

    def whole(x_nSC: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_nSC, 0, 1).reshape(S, n * size)[:, :own].reshape(B, T)

    pieces = cut(hidden_BTD), cut(targets_BT), cut(weight_BT.astype(jnp.float32))
    total, nll, said = _pieces_loss(z_loss, pieces[0], head_DV, *pieces[1:])
    return HeadLoss(total, jax.lax.stop_gradient(whole(nll)), whole(said))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pieces_loss(z_loss, hidden_nSCD, head_DV, targets_nSC, weight_nSC):
    return _scan(z_loss, hidden_nSCD, head_DV, targets_nSC, weight_nSC, gradient=False)[0]


def _forward(z_loss, hidden_nSCD, head_DV, targets_nSC, weight_nSC):
    return _scan(z_loss, hidden_nSCD, head_DV, targets_nSC, weight_nSC, gradient=True)


def _backward(z_loss, gradients, given):
    del z_loss
    scaled = lambda g, like: (given[0] * g).astype(like)  # noqa: E731
    (d_hidden_nSCD, d_head_DV), (hidden_dtype, head_dtype) = gradients
    return scaled(d_hidden_nSCD, hidden_dtype.dtype), scaled(d_head_DV, head_dtype.dtype), None, None


_pieces_loss.defvjp(_forward, _backward)


def _scan(z_loss, hidden_nSCD, head_DV, targets_nSC, weight_nSC, gradient: bool):
    """((total, nll, said), ((gradient of hidden, of head), (empty arrays of their dtypes)) or None)."""
    n, S, C, D = hidden_nSCD.shape
    dtype, V = hidden_nSCD.dtype, head_DV.shape[1]
    head = rules_lib.constrain(head_DV.astype(dtype), None, "vocab")  # gathered once, not once a chunk
    ids_V = jnp.arange(V, dtype=targets_nSC.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def chunk(carry, piece):
        total, d_head_SDV = carry
        h_SCD, target_SC, w_SC = piece
        # Two dimensions: XLA's CPU backend has a fast product for matrices only.
        logits_SCV = product("nd,dv->nv", h_SCD.reshape(S * C, D), head).reshape(S, C, V)
        top_SC1 = logits_SCV.max(-1, keepdims=True)
        is_target_SCV = ids_V == target_SC[..., None]
        # A comparison instead of a gather, and a minimum instead of argmax: they are as good where V is split.
        said_SC = jnp.where(logits_SCV == top_SC1, ids_V, V).min(-1)
        lse_SC = jnp.log(jnp.exp(logits_SCV - top_SC1).sum(-1)) + top_SC1[..., 0]
        nll_SC = lse_SC - jnp.where(is_target_SCV, logits_SCV, 0.0).sum(-1)
        total = total + (w_SC * (nll_SC + z_loss * jnp.square(lse_SC))).sum()
        out = nll_SC, said_SC
        if gradient:
            p_SCV = jnp.exp(logits_SCV - lse_SC[..., None]) * (1 + 2 * z_loss * lse_SC[..., None])
            d_SCV = ((p_SCV - is_target_SCV) * w_SC[..., None]).astype(dtype)
            d_h_SCD = product("nv,dv->nd", d_SCV.reshape(S * C, V), head).reshape(S, C, D).astype(dtype)
            # A sum a shard: added up over devices once, after the scan.
            if S == 1:
                d_head_SDV = d_head_SDV + product("nd,nv->dv", h_SCD[0], d_SCV[0])
            else:
                d_head_SDV = d_head_SDV + product("scd,scv->sdv", h_SCD, d_SCV)
            out += (d_h_SCD,)
        return (total, d_head_SDV), out

    sums = None
    if gradient:
        sums = jnp.zeros((D, V) if S == 1 else (S, D, V), jnp.float32)
        if S > 1:
            sums = rules_lib.constrain(sums, "batch", None, "vocab")
    (total, d_head), (nll, said, *d_hidden) = jax.lax.scan(
        chunk, (jnp.zeros((), jnp.float32), sums), (hidden_nSCD, targets_nSC, weight_nSC)
    )
    if not gradient:
        return (total, nll, said), None
    d_head_DV = d_head if S == 1 else d_head.sum(0)
    return (total, nll, said), ((d_hidden[0], d_head_DV), (jnp.zeros((0,), dtype), jnp.zeros((0,), head_DV.dtype)))
