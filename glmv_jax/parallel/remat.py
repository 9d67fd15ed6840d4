"""Rematerialisation policies by name: what a layer keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import jax

from glmv_jax.typing import UserError

POLICIES: dict[str, Callable | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,  # keep a layer's input only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul outputs, recompute the rest
}


def policy(name: str) -> Callable | None:
    """The policy called `name`; None for "none" (no rematerialisation). UserError names the known ones."""
    if name == "none":
        return None
    if name not in POLICIES:
        raise UserError(f"remat policy {name!r} is not known; choose none, {', '.join(POLICIES)}")
    return POLICIES[name]
