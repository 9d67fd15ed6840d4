"""Where keys and values lie that decoding keeps: rows over the data axes, heads over the axis that splits heads.

A cache has rows and heads merged in one axis of B * G entries, row after row (`kernels.attention.cached` says why).
Over a mesh that splits heads a device has its rows, and of each its heads, merged in the same way: the whole axis is in
the devices' order, (shard of rows, part of the heads, row, head). What writes or reads entries does so with each
device's own (`context.per_device`), and nothing passes between devices; who moves whole rows counts in this order
(`inference.programs`). Latents and states have no heads: every device has those of its rows.
"""

from __future__ import annotations

import math

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import UserError


def parts(where: tuple[Mesh, rules_lib.Rules] | None = None) -> int:
    """How many parts heads are in on this mesh by these rules, by default in the step that is being traced, or 1."""
    where = where or rules_lib.active()
    return 1 if where is None else math.prod(where[0].shape[axis] for axis in _axes("kv_heads", *where))


def spec(mesh: Mesh, rules: rules_lib.Rules, heads: bool = True) -> P:
    """Where the axis of rows lives, and with `heads` that of rows and heads."""
    axes = _axes("batch", mesh, rules) + (_axes("kv_heads", mesh, rules) if heads else ())
    return P(axes or None)


def check(heads: int, parts: int) -> None:
    """UserError when so many heads of keys do not divide."""
    if heads % parts:
        fits = math.gcd(heads, parts)
        raise UserError(f"{heads} heads of keys and values do not divide over {parts} devices, over {fits} they do; "
                        f"make mesh.tensor {fits}, and data or expert larger")  # fmt: skip


def _axes(name: str, mesh: Mesh, rules: rules_lib.Rules) -> tuple[str, ...]:
    return rules_lib.entry_axes(rules.spec((name,), mesh)[0])
