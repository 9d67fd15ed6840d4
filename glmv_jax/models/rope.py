"""Rotary position embeddings: 2-D axial for CogViT, 1-D or (time, height, width) sections for the language model.

Both return (cos, sin) [B, T, K'] in float32 and come with the rotation that pairs their dimensions: vision towers and
GLM-4.5V's decoder pair i with i + K'/2 (`rotate_half`), the dense GLM decoders 2i with 2i + 1 (`rotate_pairs`). Both
rotate the first K' dimensions of a head and pass the rest through.
Sources: transformers `glm_ocr/modeling_glm_ocr.py`, `glm4v_moe/modeling_glm4v_moe.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glmv_jax.parallel import rules

Rope = tuple[jax.Array, jax.Array]


def axial(yx_BP2: jax.Array, head_dim: int, theta: float) -> Rope:
    """Angles [y * inv | x * inv | y * inv | x * inv], inv_j = theta^(-2j / (K/2)), j < K/4; absolute coordinates."""
    half = head_dim // 2
    inv = theta ** (-jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    angle = (yx_BP2.astype(jnp.float32)[..., None] * inv).reshape(*yx_BP2.shape[:-1], half)
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def sections(
    positions_BT3: jax.Array, rotary_dim: int, theta: float, split: Sequence[int], rotate: Callable | None = None
) -> Rope:
    """Frequencies are dealt to (time, height, width) in blocks of `split` (rotary_dim / 2 in all), each twice: where
    `rotate` (None: rotate_pairs) pairs dimensions."""
    inv = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    owner = jnp.repeat(jnp.arange(3), jnp.array(split), total_repeat_length=rotary_dim // 2)
    angle = jnp.take(positions_BT3.astype(jnp.float32), owner, axis=-1) * inv
    angle = jnp.concatenate([angle, angle], axis=-1) if rotate is rotate_half else jnp.repeat(angle, 2, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate_half(x_BTHK: jax.Array, rope: Rope) -> jax.Array:
    """Rotates dimension i with i + K'/2, in float32."""

    def swapped(x: jax.Array) -> jax.Array:
        low, high = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([-high, low], axis=-1)

    return _rotate(x_BTHK, rope, swapped)


def rotate_pairs(x_BTHK: jax.Array, rope: Rope) -> jax.Array:
    """Rotates dimension 2i with 2i + 1, in float32. On a TPU neighbours change places in a product with a matrix of
    ones and zeros, which is exact: the last dimension lies across a vector's lanes."""

    def swapped(x: jax.Array) -> jax.Array:
        return jnp.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)

    return _rotate(x_BTHK, rope, _swapped_by_product if rules.device().platform == "tpu" else swapped)


def _swapped_by_product(x: jax.Array) -> jax.Array:
    pairs = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(x, pairs.astype(x.dtype), precision=exact, preferred_element_type=jnp.float32)


def widened(rope: Rope, before: int, after: int) -> Rope:
    """Of so many more dimensions (even numbers, for pairs), which are not rotated: to rotate a part without cutting it
    out."""
    cos, sin = (jnp.pad(r, ((0, 0), (0, 0), (before, after)), constant_values=n) for r, n in zip(rope, (1, 0)))
    return cos, sin


def no_rotation(x_BTHK: jax.Array, rope: None) -> jax.Array:
    """For towers that learn their positions."""
    return x_BTHK


def _rotate(x_BTHK: jax.Array, rope: Rope, swapped: Callable) -> jax.Array:
    cos, sin = (r[:, :, None, :] for r in rope)
    rotary_dim = cos.shape[-1]
    x, rest = x_BTHK[..., :rotary_dim], x_BTHK[..., rotary_dim:]
    rotated = (x.astype(jnp.float32) * cos + swapped(x).astype(jnp.float32) * sin).astype(x_BTHK.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
