"""What a layer keeps of rows while they are decoded: an array of its own, or its part of a stack of all layers.

A scan that hands each layer its part of a stack copies it out and back in, and the stack once more: gigabytes a token,
which changes one entry a row and layer. So `models.block.stack` carries the stack along whole, and a layer gets its
`Place` in it, where it writes new entries and from where it reads those that it wants.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax


class Place(NamedTuple):
    """stack: [L, ...] of all layers; layer: whose part it is, a number."""

    stack: jax.Array
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's part."""
        return self.stack.shape[1:]


Kept: TypeAlias = jax.Array | Place
LANES = 128  # of a TPU's registers


def width(numbers: int) -> int:
    """Of an entry that has so many: whole registers, or a TPU lays the cache out slots last, as it takes less room, and
    copies it to read entries and to write them."""
    return numbers if numbers <= LANES else -(-numbers // LANES) * LANES


def read(kept: Kept) -> jax.Array:
    """All of the layer's part."""
    return lax.dynamic_index_in_dim(*kept, keepdims=False) if isinstance(kept, Place) else kept


def take(kept: Kept, at_BA: jax.Array) -> jax.Array:
    """[B, A, X]: of each row [B, S, X] the entries in these slots; one that is out of bounds is the last."""
    if not isinstance(kept, Place):
        return jnp.take_along_axis(kept, at_BA[..., None], axis=1, mode="clip")
    where = lax.GatherDimensionNumbers(
        offset_dims=(2,), collapsed_slice_dims=(0, 2), start_index_map=(0, 2),
        operand_batching_dims=(1,), start_indices_batching_dims=(0,),
    )  # fmt: skip
    sizes = (1, 1, 1, kept.shape[-1])
    return lax.gather(kept.stack, _with_layer(kept, at_BA), where, sizes, mode="clip")


def put(kept: Kept, new: jax.Array) -> Kept:
    """With this in place of all of the layer's part."""
    if not isinstance(kept, Place):
        return new
    return kept._replace(stack=lax.dynamic_update_index_in_dim(kept.stack, new, kept.layer, axis=0))


def write(kept: Kept, new_BTX: jax.Array, slot_B: jax.Array) -> Kept:
    """With T entries from this slot on in each row [B, S, X]; one slot, [1], is that of all rows. Behind a slot that
    has no room for T entries they take the last T. Entries shorter than X end with zeros."""
    new_BTX = jnp.pad(new_BTX, ((0, 0), (0, 0), (0, kept.shape[-1] - new_BTX.shape[-1])))
    if not isinstance(kept, Place):
        new_BTX = new_BTX.astype(kept.dtype)
        if len(slot_B) == 1:
            return lax.dynamic_update_slice_in_dim(kept, new_BTX, slot_B[0], axis=1)
        return jax.vmap(lambda old, new, at: lax.dynamic_update_slice_in_dim(old, new, at, 0))(kept, new_BTX, slot_B)
    stack, new_BTX = kept.stack, new_BTX.astype(kept.stack.dtype)
    if len(slot_B) == 1:
        return kept._replace(stack=lax.dynamic_update_slice(stack, new_BTX[None], (kept.layer, 0, slot_B[0], 0)))
    where = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,), scatter_indices_batching_dims=(0,),
    )  # fmt: skip
    return kept._replace(
        stack=lax.scatter(stack, _with_layer(kept, slot_B), new_BTX, where, unique_indices=True, mode="clip")
    )


def _with_layer(kept: Place, slots: jax.Array) -> jax.Array:
    """[..., 2]: numbers of the layer and of slots."""
    return jnp.stack([jnp.broadcast_to(kept.layer.astype(slots.dtype), slots.shape), slots], axis=-1)
