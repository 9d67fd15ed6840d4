"""PHI-S: a teacher's features turned and scaled so that every channel has unit variance, by one number for all of them.

    y = H U^T (x - mean) / phi,   covariance = U diag(e) U^T,   phi = sqrt(mean of e),   H H^T = I

U^T makes channels independent, and a Hadamard matrix, whose entries are all +-1/sqrt(C), gives each channel an equal
part of every one of them. Unlike standardising by channel it keeps angles and relative distances, and is undone by its
transpose (Ranzinger et al., PHI-S, arXiv 2410.01680). Hadamard matrices are Sylvester's doublings of one of Paley's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from glmv_jax.typing import Params, UserError


def hadamard(n: int) -> np.ndarray:
    """[n, n] float64 of entries +-1/sqrt(n) with H H^T = I; n is 2^k, or 2^k (q + 1) for a prime q = 3 mod 4.

    UserError for other n: no such construction is known here.
    """
    power = n & -n  # of two, the largest that divides n
    base = 1 if n == power else next((b for k in range(power.bit_length()) if _paley(b := n // power * 2**k)), 0)
    if not base:
        raise UserError(f"PHI-S needs a Hadamard matrix, and there is none here for {n} channels; "
                        'set this teacher\'s normalise="channel"')
    matrix = _paley_matrix(base) if base > 1 else np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(n)


def _paley(n: int) -> bool:
    q = n - 1
    return q % 4 == 3 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley_matrix(n: int) -> np.ndarray:
    """Paley's first construction: I + S, where S borders the matrix of the quadratic character of differences."""
    q = n - 1
    character = np.full(q, -1.0)
    character[np.arange(q) ** 2 % q] = 1.0
    character[0] = 0.0
    rows = np.arange(q)
    skew = np.zeros((n, n))
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = character[(rows[:, None] - rows[None]) % q]
    return np.eye(n) + skew


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
    """count: rows seen. mean [C], scatter [C, C]: sum over rows of (x - mean)(x - mean)^T; float64."""

    count: float
    mean: np.ndarray
    scatter: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        """Of both samples together (Chan et al.)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), scatter)


def batch_moments(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean [C] and scatter [C, C] of the rows of features [..., C], float32 throughout."""
    rows = features.astype(jnp.float32).reshape(-1, features.shape[-1])
    mean = rows.mean(0)
    away = rows - mean
    return mean, jnp.matmul(away.T, away, precision=jax.lax.Precision.HIGHEST)


# --- the transform ----------------------------------------------------------------------------------------------------


def init(channels: int) -> Params:
    """mean [C] and turn [C, C] before `fit`: not numbers, so that nothing is learnt from what was never fitted."""
    hadamard(channels)  # now, rather than after the statistics
    return {"mean": jnp.full(channels, jnp.nan), "turn": jnp.full((channels, channels), jnp.nan)}


def fit(moments: Moments) -> dict[str, np.ndarray]:
    """mean [C] and turn = H U^T / phi [C, C], float32, from what was seen; UserError when that is too little."""
    channels = len(moments.mean)
    if moments.count < channels:
        raise UserError(f"PHI-S saw {moments.count:.0f} features of {channels} channels; raise loss.calibration")
    values, vectors_CE = np.linalg.eigh(moments.scatter / moments.count)
    phi = np.sqrt(max(values.mean(), 1e-12))
    turn = hadamard(channels) @ vectors_CE.T / phi
    return {"mean": moments.mean.astype(np.float32), "turn": turn.astype(np.float32)}


@jax.named_scope("teacher")
def apply(features: jax.Array, fitted: Params) -> jax.Array:
    """[..., C] -> [..., C] float32."""
    away = features.astype(jnp.float32) - fitted["mean"]
    return jnp.matmul(away, fitted["turn"].T, precision=jax.lax.Precision.HIGHEST)
