"""The collectives of a compiled program."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from glmv_jax.aot.costs import KINDS
from glmv_jax.aot.hlo import parse


class Collective(NamedTuple):
    """kind: one of aot.costs.KINDS; dtype and shape of what one device gets of it."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def collectives(compiled: Any) -> list[Collective]:
    """All of them, one entry an array; those in a loop once."""
    computations = parse(compiled.as_text()).computations.values()
    kinds = [(op.opcode.removesuffix("-start"), op) for computation in computations for op in computation.ops]
    return [Collective(kind, array.dtype, array.dims) for kind, op in kinds if kind in KINDS for array in op.arrays]
