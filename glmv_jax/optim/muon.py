"""Muon: momentum whose matrices are orthogonalised before they are applied.

A matrix is the last two dimensions of a leaf, [..., I, O]; whatever stands before them is a stack (scan keeps all
layers of a tower in one leaf), and every matrix of the stack is orthogonalised by itself. `optax.contrib.muon` guesses
the matrices from the number of dimensions, which is backwards for stacked layers (a stack of norm scales looks like a
matrix, a stack of matrices does not), and corrects its momentum for a bias that orthogonalisation removes anyway; hence
our own.

Sources: Keller Jordan, github.com/KellerJordan/Muon `muon.py` (algorithm, coefficients); Moonlight (arXiv 2502.16982,
github.com/MoonshotAI/Moonlight `examples/toy_train.py`) for the scale that makes AdamW's learning rates fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glmv_jax.optim.spread import split_of, spread
from glmv_jax.parallel import rules
from glmv_jax.trees import flatten
from glmv_jax.typing import Params

# Quintic iteration x <- a x + b x^3 + c x^5 on the singular values; pulls [~1e-2, 1] into about [0.7, 1.2] in 5 steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """momentum: float32, the shape of the parameters."""

    momentum: Params


def orthogonalise(update_IO: jax.Array, steps: int = 5, dtype: Any = jnp.float32, eps: float = 1e-7) -> jax.Array:
    """The nearest semi-orthogonal matrix, roughly (singular values in about [0.7, 1.2]), by Newton-Schulz.

    Args:
      update_IO: [..., I, O]; each matrix of the stack by itself.
      steps: iterations.
      dtype: of the inputs of the matrix products. bfloat16 is enough where the hardware is fast at it: the Frobenius
        norm, the sums and the polynomial stay in float32. float32 products are as exact as JAX's default precision
        makes them: one bfloat16 pass on TPUs, TF32 on recent GPUs, unless `jax.default_matmul_precision` says more.
      eps: added to the norm, so that a zero matrix stays zero.

    Returns: [..., I, O] float32.
    """
    a, b, c = COEFFICIENTS
    x = update_IO.astype(jnp.float32)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    wide = x.shape[-2] <= x.shape[-1]  # the Gram matrix is taken on the short side
    x = x if wide else x.mT

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32)

    def step(_: Any, x: jax.Array) -> jax.Array:
        gram = product(x, x.mT)
        return a * x + product(b * gram + c * product(gram, gram), x)

    # On TPUs a loop: products are what a compiler takes longest for, and GLM-5V has eighteen kinds of matrices.
    x = jax.lax.fori_loop(0, steps, step, x, unroll=rules.device().platform != "tpu")
    return x if wide else x.mT


def matrix_scale(shape: tuple[int, ...], scaling: str) -> float:
    """What an orthogonal [..., I, O] update is multiplied by.

    "rms":  0.2 * sqrt(max(I, O)): each entry then has the root mean square of a typical AdamW update (Moonlight).
    "spectral": sqrt(max(1, O / I)): the update has a unit operator norm from RMS to RMS (Keller Jordan; his matrices
    are [out, in], ours are [in, out]).
    """
    rows, columns = shape[-2:]
    if scaling == "rms":
        return 0.2 * max(rows, columns) ** 0.5
    if scaling == "spectral":
        return max(1.0, columns / rows) ** 0.5
    raise ValueError(f"scaling={scaling!r} is neither 'rms' nor 'spectral'")


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    dtype: Any = jnp.float32,
    scaling: str = "rms",
    heads: int = 1,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> optax.GradientTransformation:
    """Gradients -> scaled orthogonal updates (not yet times the learning rate, sign unchanged).

    Momentum is M <- momentum M + (1 - momentum) g in float32; Nesterov looks ahead with
    momentum M + (1 - momentum) g. Moonlight writes M <- momentum M + g: the factor is lost in the normalisation.

    Args:
      steps, dtype: of `orthogonalise`.
      scaling: of `matrix_scale`.
      heads: a matrix counts as so many, side by side in its columns: each head of a projection is orthogonalised by
        itself (GLM-5's Muon Split), so that heads may change at different rates.
      shardings: slash path -> where that parameter lives. With it, and more than one device, the matrices are shared
        out among the devices (`optim.spread`); without it every device orthogonalises all of them.

    Raises: ValueError at init for a leaf of fewer than two dimensions, or columns that `heads` does not divide.
    """

    def init(params: Params) -> MuonState:
        for path, leaf in flatten(params).items():
            if len(leaf.shape) < 2:
                raise ValueError(f"Muon needs matrices, and {path} has shape {leaf.shape}; give it to AdamW")
            if leaf.shape[-1] % heads:
                raise ValueError(f"{path} {leaf.shape}: its columns do not divide into {heads} heads")
        return MuonState(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(grads: Any, state: MuonState, params: Params | None = None) -> tuple[Any, MuonState]:
        del params
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, grads)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mean, grads) if nesterov else mean

        leaves = jax.tree.leaves(ahead)
        where = [shardings[path] for path in flatten(ahead)] if shardings else None
        done = _all(lambda x: orthogonalise(x, steps, dtype), leaves, heads, dtype, where)
        updates = [x * matrix_scale((x.shape[-2], x.shape[-1] // heads), scaling) for x in done]
        return jax.tree.unflatten(jax.tree.structure(ahead), updates), MuonState(mean)

    return optax.GradientTransformation(init, update)


def _all(
    fn: Callable, leaves: Sequence[jax.Array], heads: int, dtype: Any, shardings: list[NamedSharding] | None
) -> list[jax.Array]:
    """fn of every leaf [..., I, O], head by head, on all devices alike or shared out among them."""
    if shardings is None or shardings[0].mesh.size == 1:
        return [_unstack(fn(_stack(leaf, heads)), leaf.shape, heads) for leaf in leaves]
    mesh = shardings[0].mesh
    # Where the products are in bfloat16, the matrices travel so too.
    few, small = lambda x: fn(x).astype(dtype), [leaf.astype(dtype) for leaf in leaves]
    if heads == 1:
        return [x.astype(jnp.float32) for x in spread(few, small, [s.spec for s in shardings], mesh)]
    # What splits the columns would split the stack of heads, and a stack is whole.
    splits = [split_of(s.spec, leaf.ndim, mesh) for s, leaf in zip(shardings, leaves)]
    specs = [P(split.stack or None, split.rows or None) for split in splits]
    done = spread(few, [_stack(x, heads) for x in small], specs, mesh)
    return [_unstack(x.astype(jnp.float32), leaf.shape, heads) for x, leaf in zip(done, leaves)]


def _stack(x: jax.Array, heads: int) -> jax.Array:
    """[..., I, H * K] -> [S * H, I, K]."""
    *_, rows, columns = x.shape
    return jnp.moveaxis(x.reshape(-1, rows, heads, columns // heads), 2, 1).reshape(-1, rows, columns // heads)


def _unstack(x: jax.Array, shape: tuple[int, ...], heads: int) -> jax.Array:
    """The inverse of `_stack`."""
    *_, rows, columns = shape
    return jnp.moveaxis(x.reshape(-1, heads, rows, columns // heads), 1, 2).reshape(shape)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    dtype: Any = jnp.float32,
    scaling: str = "rms",
    heads: int = 1,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> optax.GradientTransformation:
    """Muon with decoupled weight decay: p <- p - lr * (scale * orthogonal + weight_decay * p).

    With scaling="rms" the learning rate and the weight decay are those one would give to AdamW.
    """
    return optax.chain(
        scale_by_muon(momentum, nesterov, steps, dtype, scaling, heads, shardings),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
