"""Rematerialisation policies by name: what a layer keeps for its backward pass, and where.

Memory of L layers that are scanned over x, with one layer's own needs beside it:

    none       whatever the backward pass reads, L times
    dots       results of products and of attention, L times
    attention  x and the result of attention, whose kernel is then not run again, and what a layer of GLM-5 makes of the
               two, L times
    full       x, L times
    offload    x, L times, in the host's memory: what a device holds does not grow with L. Each layer's x is sent there
               when the layer begins, and fetched when its backward pass does
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from glmv_jax.parallel import rules
from glmv_jax.typing import UserError

INPUT = "layer_input"
ATTENTION = "attention"  # what attention kernels call their results, and layers what they add them to
HOST = "pinned_host"

_keep = jax.checkpoint_policies
_attention = _keep.save_only_these_names(ATTENTION)
POLICIES: dict[str, Callable] = {
    "full": _keep.nothing_saveable,
    "attention": _attention,
    "dots": _keep.save_from_both_policies(_attention, _keep.dots_with_no_batch_dims_saveable),
    "offload": _keep.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], offload_src="device", offload_dst=HOST
    ),
}


def policy(name: str) -> Callable | None:
    """The policy called `name`; None for "none" (no rematerialisation).

    "offload" sends what `named` has marked. On a CPU, whose memory is the host's already, it is "full".
    Raises: UserError for other names, and where devices have no way to the host's memory.
    """
    if name == "none":
        return None
    if name not in POLICIES:
        raise UserError(f"remat policy {name!r} is not known; choose none, {', '.join(POLICIES)}")
    if name != "offload":
        return POLICIES[name]
    device = rules.device()
    if device.platform == "cpu":
        return POLICIES["full"]
    if HOST not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise UserError(
            f"remat=offload: {device.device_kind} has no memory of the kind {HOST} ({', '.join(kinds)}); take "
            "remat=full with chunk, or fewer patches_at_once"
        )
    return POLICIES[name]


def named(x: jax.Array) -> jax.Array:
    """x, marked as what a layer begins with. A policy that sends it away finds it by that, if the layer reads nothing
    of x but this."""
    return checkpoint_name(x, INPUT)
