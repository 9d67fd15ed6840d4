"""The collectives of a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_LINE = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.+?) ({'|'.join(KINDS)})(?:-start)?\(", re.MULTILINE)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """kind: one of KINDS; dtype and shape of what one device gets of it."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def collectives(compiled: Any) -> list[Collective]:
    """All of them, one entry an array; those in a loop once. AssertionError when lines with one are not understood."""
    text = compiled.as_text()
    found = []
    for result, kind in _LINE.findall(text):
        for dtype, dims in _SHAPE.findall(result):
            found.append(Collective(kind, dtype, tuple(int(n) for n in dims.split(",") if n)))
    lines = len(re.findall(rf"= .+? (?:{'|'.join(KINDS)})(?:-start)?\(", text))
    assert len(_LINE.findall(text)) == lines, "collectives in lines of another form"
    return found
