"""Rotary position embeddings: 2-D axial for CogViT, 1-D or (time, height, width) sections for the language model.

Both return (cos, sin) [B, T, K'] in float32 and come with the rotation that pairs their dimensions: vision towers and
GLM-4.5V's decoder pair i with i + K'/2 (`rotate_half`), the dense GLM decoders 2i with 2i + 1 (`rotate_pairs`). Both
rotate the first K' dimensions of a head and pass the rest through.
Sources: transformers `glm_ocr/modeling_glm_ocr.py`, `glm4v_moe/modeling_glm4v_moe.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Rope = tuple[jax.Array, jax.Array]


def axial(yx_BP2: jax.Array, head_dim: int, theta: float) -> Rope:
    """Angles [y * inv | x * inv | y * inv | x * inv], inv_j = theta^(-2j / (K/2)), j < K/4; absolute coordinates."""
    half = head_dim // 2
    inv = theta ** (-jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    angle = (yx_BP2.astype(jnp.float32)[..., None] * inv).reshape(*yx_BP2.shape[:-1], half)
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def sections(
    positions_BT3: jax.Array, rotary_dim: int, theta: float, split: tuple[int, int, int], rotate: Callable | None = None
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
    """Rotates dimension 2i with 2i + 1, in float32."""
    return _rotate(x_BTHK, rope, lambda x: jnp.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape))


def no_rotation(x_BTHK: jax.Array, rope: None) -> jax.Array:
    """For towers that learn their positions."""
    return x_BTHK


def _rotate(x_BTHK: jax.Array, rope: Rope, swapped: Callable) -> jax.Array:
    cos, sin = (r[:, :, None, :] for r in rope)
    rotary_dim = cos.shape[-1]
    x, rest = x_BTHK[..., :rotary_dim].astype(jnp.float32), x_BTHK[..., rotary_dim:]
    return jnp.concatenate([(x * cos + swapped(x) * sin).astype(x_BTHK.dtype), rest], axis=-1)
