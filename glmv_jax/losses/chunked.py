"""Cross-entropy through the output head without its logits: some tokens at a time, and their gradient at once.

Logits [B, T, V] and their gradient are the largest arrays of a step. Here a scan makes those of one chunk of tokens,
takes from them what the loss and its metrics need, and adds up the gradient of the hidden states and of the head on the
way (as the fused loss of Liger-Kernel does, arXiv 2410.10989). The loss being a weighted sum, the backward pass only
has to scale it. So nothing is computed twice, where rematerialisation would pay one more product with the head. Where
one chunk holds all tokens, the gradient of its logits waits for the backward pass instead: it is no larger than what
was there anyway, and the head's gradient is written once, not summed and then scaled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.parallel import context
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib

CHUNK = 1024  # tokens at a time on a device: 0.25 GB of logits where V = 59,392


class HeadLoss(NamedTuple):
    """total: scalar, sum(weight * (nll + z_loss * logsumexp^2)), all that has a gradient. nll_BT: -log p(target),
    unweighted; said_BT: the most probable token."""

    total: jax.Array
    nll_BT: jax.Array
    said_BT: jax.Array


@jax.named_scope("head")
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

    Within `parallel.rules.use` each device cuts its own rows, or its parts of rows (`parallel.context`), into chunks,
    and the head may be split over its columns.
    """
    cut = _Cut.of(hidden_BTD, chunk)
    pieces = cut(hidden_BTD), cut(targets_BT), cut(weight_BT.astype(jnp.float32))
    total, nll, said = _pieces_loss(z_loss, pieces[0], head_DV, *pieces[1:])
    return HeadLoss(total, jax.lax.stop_gradient(cut.back(nll)), cut.back(said))


@jax.named_scope("head")
def head_logprobs(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the entropy of p, p = softmax(hidden @ head / temperature): [B, T] float32 each.

    For losses that are no weighted sum of log-probabilities, so that the logits of a chunk are computed once more in
    the backward pass. The entropy is a number for the log, without a gradient. Other arguments as in `head_loss`.
    """
    cut = _Cut.of(hidden_BTD, chunk)
    logprob, entropy = _pieces_logprobs(temperature, cut(hidden_BTD), head_DV, cut(targets_BT))
    return cut.back(logprob), jax.lax.stop_gradient(cut.back(entropy))


@jax.named_scope("head")
def head_map(
    fn: Callable[..., Any],
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    *given: jax.Array,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Any:
    """fn(log p [..., V], *given) of every token, p as in `head_logprobs`, for what needs more of p than one token's.

    Args:
      fn: from log-probabilities [S, C, V] float32 and what is `given` of these tokens, [S, C, ...], to a tree of arrays
        [S, C, ...]; it takes each token by itself.
      given: [B, T, ...] each, without a gradient. Other arguments as in `head_loss`.

    Returns: the tree with arrays [B, T, ...]. The logits of a chunk are computed once more in the backward pass.
    """
    cut = _Cut.of(hidden_BTD, chunk)
    pieces = cut(hidden_BTD), tuple(cut(jax.lax.stop_gradient(x)) for x in given)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(h_SCD: jax.Array, *given_SC: tuple) -> Any:
        # The head is cast in here: its gradient is then summed over chunks in the parameter's dtype.
        logits_SCV = _Head.of(head_DV, pieces[0]).logits(h_SCD) / temperature
        return fn(logits_SCV - _logsumexp(logits_SCV)[0][..., None], *given_SC)

    _, out = jax.lax.scan(lambda _, piece: (None, one(piece[0], *piece[1])), None, pieces)
    return jax.tree.map(cut.back, out)


class _Cut(NamedTuple):
    """Rows [B, T, ...] as [n, S, C, ...]: n chunks of C tokens of each of S = rows x parts shards; the last one is
    filled up with zeros. rows: shards of B; parts: of T."""

    B: int
    T: int
    rows: int
    parts: int
    n: int
    C: int

    @classmethod
    def of(cls, x_BT: jax.Array, chunk: int) -> _Cut:
        B, T = x_BT.shape[:2]
        rows, parts = mesh_lib.data_shards(rules_lib.active_mesh()), context.parts()
        if B % rows or T % parts:
            rows = parts = 1
        own = B // rows * (T // parts)
        n = max(1, -(-own // chunk)) if chunk else 1
        return cls(B, T, rows, parts, n, -(-own // n))

    def __call__(self, x_BT: jax.Array) -> jax.Array:
        B, T, R, N, n, C = self
        rest = x_BT.shape[2:]
        x = x_BT.reshape(R, B // R, N, T // N, *rest).swapaxes(1, 2).reshape(R * N, -1, *rest)
        x = jnp.pad(x, ((0, 0), (0, n * C - x.shape[1]), *[(0, 0)] * len(rest)))
        return jnp.moveaxis(x.reshape(R * N, n, C, *rest), 1, 0)

    def back(self, x_nSC: jax.Array) -> jax.Array:
        B, T, R, N, n, C = self
        rest = x_nSC.shape[3:]
        x = jnp.moveaxis(x_nSC, 0, 1).reshape(R * N, n * C, *rest)[:, : B // R * (T // N)]
        return x.reshape(R, N, B // R, T // N, *rest).swapaxes(1, 2).reshape(B, T, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pieces_loss(
    z_loss: float, hidden_nSCD: jax.Array, head_DV: jax.Array, targets_nSC: jax.Array, weight_nSC: jax.Array
) -> tuple:
    return _scan(z_loss, hidden_nSCD, head_DV, targets_nSC, weight_nSC, gradient=False)[0]


def _forward(
    z_loss: float, hidden_nSCD: jax.Array, head_DV: jax.Array, targets_nSC: jax.Array, weight_nSC: jax.Array
) -> tuple:
    if len(hidden_nSCD) > 1:
        return _scan(z_loss, hidden_nSCD, head_DV, targets_nSC, weight_nSC, gradient=True)
    head = _Head.of(head_DV, hidden_nSCD)
    total, nll_SC, said_SC, d_SCV = _piece(z_loss, head, hidden_nSCD[0], targets_nSC[0], weight_nSC[0])
    return (total, nll_SC[None], said_SC[None]), (hidden_nSCD, head_DV, d_SCV)


def _backward(z_loss: float, kept: tuple, given: tuple) -> tuple:
    del z_loss
    if len(kept) == 2:
        scaled = lambda g, like: (given[0] * g).astype(like)  # noqa: E731
        (d_hidden_nSCD, d_head_DV), (hidden_dtype, head_dtype) = kept
        return scaled(d_hidden_nSCD, hidden_dtype.dtype), scaled(d_head_DV, head_dtype.dtype), None, None
    hidden_nSCD, head_DV, d_SCV = kept
    head = _Head.of(head_DV, hidden_nSCD)
    d_hidden_SCD, d_head = head.gradients(hidden_nSCD[0], (given[0] * d_SCV).astype(d_SCV.dtype))
    return d_hidden_SCD[None], head.summed(d_head).astype(head_DV.dtype), None, None


_pieces_loss.defvjp(_forward, _backward)


def _piece(z_loss: float, head: _Head, h_SCD: jax.Array, target_SC: jax.Array, w_SC: jax.Array) -> tuple:
    """Of one chunk: the sum of its losses, nll, what is said, and the gradient of the logits, in the dtype of h."""
    V = head.head_DV.shape[1]
    ids_V = jnp.arange(V, dtype=target_SC.dtype)
    logits_SCV = head.logits(h_SCD)
    lse_SC, top_SC1 = _logsumexp(logits_SCV)
    is_target_SCV = ids_V == target_SC[..., None]
    # A comparison instead of a gather, and a minimum instead of argmax: they are as good where V is split.
    said_SC = jnp.where(logits_SCV == top_SC1, ids_V, V).min(-1)
    nll_SC = lse_SC - jnp.where(is_target_SCV, logits_SCV, 0.0).sum(-1)
    total = (w_SC * (nll_SC + z_loss * jnp.square(lse_SC))).sum()
    p_SCV = jnp.exp(logits_SCV - lse_SC[..., None]) * (1 + 2 * z_loss * lse_SC[..., None])
    d_SCV = (p_SCV - is_target_SCV) * w_SC[..., None]
    return total, nll_SC, said_SC, d_SCV.astype(h_SCD.dtype)


def _scan(
    z_loss: float, hidden_nSCD: jax.Array, head_DV: jax.Array, targets_nSC: jax.Array, weight_nSC: jax.Array,
    gradient: bool,
) -> tuple:  # fmt: skip
    """((total, nll, said), ((gradient of hidden, of head), (empty arrays of their dtypes)) or None)."""
    head = _Head.of(head_DV, hidden_nSCD)

    def chunk(carry: tuple, piece: tuple) -> tuple[Any, Any]:
        total, d_head = carry
        h_SCD = piece[0]
        more, nll_SC, said_SC, d_SCV = _piece(z_loss, head, *piece)
        out = nll_SC, said_SC
        if gradient:
            d_h_SCD, of_head = head.gradients(h_SCD, d_SCV)
            d_head, out = d_head + of_head, (*out, d_h_SCD)
        return (total + more, d_head), out

    sums = head.no_gradient() if gradient else None
    (total, d_head), (nll, said, *d_hidden) = jax.lax.scan(
        chunk, (jnp.zeros((), jnp.float32), sums), (hidden_nSCD, targets_nSC, weight_nSC)
    )
    if d_head is None:
        return (total, nll, said), None
    dtypes = jnp.zeros((0,), hidden_nSCD.dtype), jnp.zeros((0,), head_DV.dtype)
    return (total, nll, said), ((d_hidden[0], head.summed(d_head)), dtypes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pieces_logprobs(temperature: float, hidden_nSCD: jax.Array, head_DV: jax.Array, targets_nSC: jax.Array) -> tuple:
    return _logprobs_forward(temperature, hidden_nSCD, head_DV, targets_nSC)[0]


def _logprobs_forward(temperature: float, hidden_nSCD: jax.Array, head_DV: jax.Array, targets_nSC: jax.Array) -> tuple:
    head = _Head.of(head_DV, hidden_nSCD)
    ids_V = jnp.arange(head_DV.shape[1], dtype=targets_nSC.dtype)

    def chunk(_: Any, piece: tuple) -> tuple[Any, Any]:
        h_SCD, target_SC = piece
        logits_SCV = head.logits(h_SCD) / temperature
        lse_SC, _ = _logsumexp(logits_SCV)
        at_SC = jnp.where(ids_V == target_SC[..., None], logits_SCV, 0.0).sum(-1)
        logp_SCV = logits_SCV - lse_SC[..., None]
        return None, (at_SC - lse_SC, -(jnp.exp(logp_SCV) * logp_SCV).sum(-1), lse_SC)

    _, (logprob, entropy, lse) = jax.lax.scan(chunk, None, (hidden_nSCD, targets_nSC))
    return (logprob, entropy), (hidden_nSCD, head_DV, targets_nSC, lse)


def _logprobs_backward(temperature: float, kept: tuple, given: tuple) -> tuple:
    hidden_nSCD, head_DV, targets_nSC, lse_nSC = kept
    head = _Head.of(head_DV, hidden_nSCD)
    ids_V = jnp.arange(head_DV.shape[1], dtype=targets_nSC.dtype)

    def chunk(d_head: jax.Array, piece: tuple) -> tuple[Any, Any]:
        h_SCD, target_SC, lse_SC, g_SC = piece
        p_SCV = jnp.exp(head.logits(h_SCD) / temperature - lse_SC[..., None])
        d_SCV = ((ids_V == target_SC[..., None]) - p_SCV) * (g_SC[..., None] / temperature)
        d_h_SCD, more = head.gradients(h_SCD, d_SCV.astype(h_SCD.dtype))
        return d_head + more, d_h_SCD

    d_head, d_hidden = jax.lax.scan(chunk, head.no_gradient(), (hidden_nSCD, targets_nSC, lse_nSC, given[0]))
    return d_hidden, head.summed(d_head).astype(head_DV.dtype), None


_pieces_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


class _Head(NamedTuple):
    """The products with the output head, of S shards of C tokens. Its gradient is summed in float32, a sum a shard,
    which devices add up once, at the end."""

    head_DV: jax.Array  # in the dtype of the products; gathered once, not once a chunk
    S: int

    @classmethod
    def of(cls, head_DV: jax.Array, hidden_nSCD: jax.Array) -> _Head:
        return cls(rules_lib.constrain(head_DV.astype(hidden_nSCD.dtype), None, "vocab"), hidden_nSCD.shape[1])

    def logits(self, h_SCD: jax.Array) -> jax.Array:
        # Two dimensions: XLA's CPU backend has a fast product for matrices only.
        flat = _product("nd,dv->nv", h_SCD.reshape(-1, h_SCD.shape[-1]), self.head_DV)
        return flat.reshape(*h_SCD.shape[:-1], -1)

    def gradients(self, h_SCD: jax.Array, d_SCV: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of hidden states, in their dtype, and of the head, a shard each."""
        d_h = _product("nv,dv->nd", d_SCV.reshape(-1, d_SCV.shape[-1]), self.head_DV)
        d_h_SCD = d_h.reshape(h_SCD.shape).astype(h_SCD.dtype)
        if self.S == 1:
            return d_h_SCD, _product("nd,nv->dv", h_SCD[0], d_SCV[0])
        return d_h_SCD, _product("scd,scv->sdv", h_SCD, d_SCV)

    def no_gradient(self) -> jax.Array:
        if self.S == 1:
            return jnp.zeros(self.head_DV.shape, jnp.float32)
        parts = context.parts()
        zeros = jnp.zeros((self.S // parts, parts, *self.head_DV.shape), jnp.float32)
        zeros = rules_lib.constrain(zeros, "batch", "length", None, "vocab")
        return zeros.reshape(self.S, *self.head_DV.shape)

    def summed(self, d_head: jax.Array) -> jax.Array:
        return d_head if self.S == 1 else d_head.sum(0)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logsumexp(logits_SCV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S, C], and the largest [S, C, 1]."""
    top_SC1 = logits_SCV.max(-1, keepdims=True)
    return jnp.log(jnp.exp(logits_SCV - top_SC1).sum(-1)) + top_SC1[..., 0], top_SC1
