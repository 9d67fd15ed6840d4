"""Rotary position embeddings: 2-D axial for CogViT, 1-D or (time, height, width) sections for the language model.

Both return (cos, sin) [B, T, K'] in float32 and come with the rotation that pairs their dimensions:
CogViT pairs i with i + K/2 (`rotate_half`), the GLM decoder pairs 2i with 2i + 1 (`rotate_pairs`).
Source: transformers `glm_ocr/modeling_glm_ocr.py`.
"""

from __future__ import annotations

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


def sections(positions_BT3: jax.Array, rotary_dim: int, theta: float, split: tuple[int, int, int]) -> Rope:
    """Frequencies are dealt to (time, height, width) in blocks of `split` (rotary_dim / 2 in all), each twice."""
    inv = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    owner = jnp.repeat(jnp.arange(3), jnp.array(split), total_repeat_length=rotary_dim // 2)
    angle = jnp.take(positions_BT3.astype(jnp.float32), owner, axis=-1) * inv
    angle = jnp.repeat(angle, 2, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate_half(x_BTHK: jax.Array, rope: Rope) -> jax.Array:
    """Rotates all of K in float32, dimension i with i + K/2."""
    x = x_BTHK.astype(jnp.float32)
    low, high = jnp.split(x, 2, axis=-1)
    return _rotate(x, jnp.concatenate([-high, low], axis=-1), rope).astype(x_BTHK.dtype)


def rotate_pairs(x_BTHK: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the first K' dimensions (K' = the width of `rope`), 2i with 2i + 1; the rest passes through."""
    rotary_dim = rope[0].shape[-1]
    x, rest = x_BTHK[..., :rotary_dim].astype(jnp.float32), x_BTHK[..., rotary_dim:]
    swapped = jnp.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
    return jnp.concatenate([_rotate(x, swapped, rope).astype(x_BTHK.dtype), rest], axis=-1)


def no_rotation(x_BTHK: jax.Array, rope: None) -> jax.Array:
    """For towers that learn their positions."""
    return x_BTHK


def _rotate(x: jax.Array, swapped: jax.Array, rope: Rope) -> jax.Array:
    cos, sin = (r[:, :, None, :] for r in rope)
    return x * cos + swapped * sin
