"""Pools of neighbouring keys, for an indexer that scores one key a pool and chooses whole pools.

Every `size` positions of a text are a pool, counted from its first. A query may choose a pool that it sees to the end;
the keys behind the last of these, fewer than `size`, it sees in any case. Source: transformers
`glm5_next/modeling_glm5_next.py` (Glm5NextTextIndexer).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["of", "last"], meta_fields=["size"])
@dataclasses.dataclass(frozen=True)
class Pools:
    """of: [B, S] int32, the number of each key's pool, P for a key without one. last: [B, P] int32, the number of each
    pool's last key, S or more for a pool that there is not."""

    of: jax.Array
    last: jax.Array
    size: int


def in_rows(segments_BS: jax.Array, size: int) -> Pools:
    """Of packed rows, where pools begin anew with every segment."""
    B, S = segments_BS.shape
    at_S = jnp.arange(S)
    begins_BS = jnp.diff(segments_BS, axis=1, prepend=segments_BS[:, :1] - 1) != 0
    place_BS = at_S - jax.lax.cummax(jnp.where(begins_BS, at_S, 0), axis=1)
    ends_BS = place_BS % size == size - 1
    last_BP = jnp.sort(jnp.where(ends_BS, at_S, S), axis=1)[:, : S // size]
    of_BS = jnp.cumsum(ends_BS, axis=1) - ends_BS  # the next pool that is complete, which may be one of a later segment
    end_BS = jnp.take_along_axis(last_BP, of_BS, axis=1, mode="clip")
    whole_BS = (of_BS < S // size) & (end_BS - at_S == size - 1 - place_BS % size)
    return Pools(jnp.where(whole_BS, of_BS, S // size), last_BP, size)


def in_slots(rows: int, slots: int, size: int) -> Pools:
    """Of rows of a cache, each one text from its first slot on."""
    of_S, first_P = jnp.arange(slots) // size, jnp.arange(0, slots, size)
    return Pools(jnp.tile(of_S, (rows, 1)), jnp.tile(first_P + size - 1, (rows, 1)), size)


def members(pools: Pools, at_BX: jax.Array | None = None) -> jax.Array:
    """[B, X, size]: numbers of the keys of these pools, by default of all; of a pool that there is not, some below 0 or
    up to S."""
    last_BX = pools.last if at_BX is None else jnp.take_along_axis(pools.last, at_BX, axis=1)
    return last_BX[..., None] - jnp.arange(pools.size - 1, -1, -1)


def mean(keys_PnK: jax.Array, scores_PnK: jax.Array) -> jax.Array:
    """One key a pool [..., K]: by channel, the mean of its n keys weighed by the softmax of their scores."""
    weights_PnK = jax.nn.softmax(scores_PnK.astype(jnp.float32), axis=-2)
    return (weights_PnK.astype(keys_PnK.dtype) * keys_PnK).sum(-2)


def seen_whole(pools: Pools, seen_BTS: jax.Array) -> jax.Array:
    """[B, T, P] bool: pools that a query sees to the end, from the keys that it sees."""
    return jnp.take_along_axis(seen_BTS, pools.last[:, None], axis=2, mode="fill", fill_value=False)


def open_keys(pools: Pools, chosen_BTP: jax.Array, whole_BTP: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """[B, T, S] bool: of the keys seen those of the chosen pools, and those of no pool that is seen to the end."""
    open_BTP = jnp.pad(chosen_BTP | ~whole_BTP, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    return seen_BTS & jnp.take_along_axis(open_BTP, pools.of[:, None], axis=2)
