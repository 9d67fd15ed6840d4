"""Which keys a query may see: by segment, by place in the row, and by branch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

# Not -inf: a query with no key at all (padding) must stay finite. Far below any logit in float32 and bfloat16.
MASKED = -2.0e38


@jax.tree_util.register_static
class InOrder:
    """A mark that is known while a program is traced: no array, so that loops and maps carry it as it is."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InOrder)

    def __hash__(self) -> int:
        return hash(InOrder)


IN_ORDER = InOrder()


class Span(NamedTuple):
    """What a position may see: the same segment and, when slots are given, keys at or before its own slot.

    segments: [B, T] int; slots: [B, T] int order inside the row, or None for attention in both directions.
    branches: [B, T] int or None: within a segment, branch 0 is a trunk that all see and every other number a branch
        that only itself sees (several continuations of one prompt).
    in_order: IN_ORDER promises that queries and keys are the same positions, each of which sees at least itself; and
        that they are all of the row, in its order (where rows are split `context.order`): slots, if any, are 0, 1, ...
    valid: [B, T] bool, of queries with a cache, or None: false for padding, which comes last in a row. Attention needs
        it not, as nothing looks there; what carries a state along a row does.
    """

    segments: jax.Array
    slots: jax.Array | Any = None
    branches: jax.Array | Any = None
    in_order: InOrder | None = None
    valid: jax.Array | Any = None


def visible(query: Span, key: Span) -> jax.Array:
    """[B, T, S] bool. Padding (segment 0) sees padding, so that its softmax is well defined; nothing else sees it."""
    mask_BTS = query.segments[:, :, None] == key.segments[:, None, :]
    if query.slots is not None:
        mask_BTS &= key.slots[:, None, :] <= query.slots[:, :, None]
    if query.branches is not None:
        key_B1S = key.branches[:, None, :]
        mask_BTS &= (key_B1S == 0) | (key_B1S == query.branches[:, :, None])
    return mask_BTS
