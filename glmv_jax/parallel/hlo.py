"""What a compiled program sends between devices, read from its text (`compiled.as_text()`): kinds, bytes, and by axis.

Bytes are those that devices need from each other, summed over all of them: in a group of n of which each has b bytes
of the whole, an all-gather brings every device n - 1 times b, a reduce-scatter as much the other way, an all-reduce is
one and then the other, an all-to-all sends each of the others a part; a permute sends what it sends. Links of a real
network may carry more (other devices' bytes come by). Those that cross an axis of a mesh are the bytes between devices
whose places on that axis differ. What a loop does counts as often as it turns; all branches of a conditional count.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|c64|c128|[sufe]\d+\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s+.*\{\s*")
_INSTRUCTION = re.compile(r"\s+(?:ROOT\s+)?%?([\w.\-]+) = (.*)")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_MESHED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _IOTA + r"\))? \{([^}]*)\}")
_CALLED = re.compile(r"\b(calls|to_apply|body|branch_computations|true_computation|false_computation|async_wrapped)="
                     r"(\{[^}]*\}|%?[\w.\-]+)")  # fmt: skip


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


class Collective(NamedTuple):
    """One collective of a program. part: bytes that one device of a group sends to each other one; of a permute and a
    broadcast only the first of a group sends. groups: of devices, by their number in the mesh. times: how often it
    runs."""

    kind: str
    name: str
    part: float
    groups: tuple[tuple[int, ...], ...]
    times: int
    asynchronous: bool

    def across(self, mesh: Mesh, axis: str) -> int:
        """Bytes between devices whose places on `axis` differ, in all its runs."""
        place = np.indices(mesh.devices.shape)[mesh.axis_names.index(axis)].ravel()
        crossing = 0
        for group in self.groups:
            where = place[list(group)]
            if self.kind in ("collective-permute", "collective-broadcast"):
                crossing += int((where != where[0]).sum())
            else:
                crossing += len(group) ** 2 - int(np.square(np.unique(where, return_counts=True)[1]).sum())
        return round(self.part * crossing * self.times)


def bytes_across(text: str, mesh: Mesh, axis: str) -> dict[str, int]:
    """{kind: bytes that cross `axis`}, of the kinds that do; see the head of this file."""
    total: collections.Counter[str] = collections.Counter()
    for one in collectives(text):
        total[one.kind] += one.across(mesh, axis)
    return {kind: n for kind, n in total.items() if n}


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, each once, in the order of the text.

    Raises: ValueError for groups in a spelling that is not known, and for a collective in a loop whose turns are not.
    """
    program, entry = _computations(text)
    times: dict[str, int | None] = {}
    _count(program, entry, 1, times)
    found = []
    for name, instructions in program.items():
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS or name not in times:
                continue
            if times[name] is None:
                raise ValueError(f"{one.name} is in a loop, and how often that turns is not in the program")
            groups = _groups(kind, one)
            part = _part(kind, one, len(groups[0]) if groups else 1)
            found.append(Collective(kind, one.name, part, groups, times[name], one.opcode != kind))
    return found


# --- the text ---------------------------------------------------------------------------------------------------------


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions by computation, the name of the first to run)."""
    program: dict[str, list[Instruction]] = {}
    entry, here = "", None
    for line in text.splitlines():
        if here is None and (match := _HEADER.fullmatch(line)) and not line.startswith(("HloModule", " ")):
            here = program.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line == "}":  # metadata of kernels spans lines, and some of those begin so
            here = None
        elif here is not None and (match := _INSTRUCTION.match(line)):
            type_, rest = _split_type(match[2])
            opcode, _, rest = rest.partition("(")
            here.append(Instruction(match[1], type_, opcode.strip(), rest))
    if not entry:
        raise ValueError("this is no program of XLA: it has no ENTRY")
    return program, entry


def _split_type(text: str) -> tuple[str, str]:
    """`(f32[2]{0}, s32[]) tuple(...)` -> its type and the rest."""
    if not text.startswith("("):
        type_, _, rest = text.partition(" ")
        return type_, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"a type without its end: {text[:80]}")


def _count(program: dict, name: str, times: int | None, counts: dict[str, int | None]) -> None:
    """Adds to `counts` how often a computation runs, and those it calls; None where that is not known."""
    before = counts.get(name, 0)
    counts[name] = None if times is None or before is None else before + times
    for one in program.get(name, ()):
        turns = _turns(program, one) if one.opcode == "while" else 1
        inner = None if times is None or turns is None else times * turns
        for _, called in _CALLED.findall(one.rest):
            for other in re.findall(r"[\w.\-]+", called):
                if other in program:
                    _count(program, other, inner, counts)


def _turns(program: dict, loop: Instruction) -> int | None:
    """How often a loop turns: as the compiler says, or the largest number its condition compares with."""
    if known := re.search(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
    inside = [*program[condition]]
    for one in program[condition]:
        inside += [i for _, called in _CALLED.findall(one.rest) for i in program.get(called.lstrip("%"), ())]
    numbers = [int(i.rest.partition(")")[0]) for i in inside if i.opcode == "constant" and i.type.startswith("s32[]")]
    return max(numbers, default=None)


def _bytes(type_: str) -> float:
    total = 0.0
    for kind, sizes in _ARRAY.findall(type_):
        size = _SIZES.get(kind) or int(re.match(r"[a-z](\d+)", kind)[1]) / 8
        total += size * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _part(kind: str, one: Instruction, n: int) -> float:
    """Bytes from one device to one other."""
    type_ = one.type
    if one.opcode.endswith("-start") and type_.startswith("(") and kind != "all-reduce":
        type_ = _elements(type_)[1]  # (what goes in, what comes out, ...)
    result = _bytes(type_)
    divided = {"all-gather": 1, "all-reduce": 2, "all-to-all": 1, "ragged-all-to-all": 1}
    return divided[kind] * result / n if kind in divided else result


def _elements(type_: str) -> list[str]:
    parts, depth = [""], 0
    for letter in type_[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _groups(kind: str, one: Instruction) -> tuple[tuple[int, ...], ...]:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.rest)[1]
        return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs))
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", one.rest):
        return tuple(tuple(int(n) for n in g.split(",")) for g in re.findall(r"\{([\d, ]+)\}", listed[1]))
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=" + _IOTA, one.rest):
        return _rows(_iota(*tiled.groups()[1:]).reshape(_numbers(tiled[1])))
    if meshed := _MESHED.search(one.rest):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        whole, order = meshed[2] or str(math.prod(sizes.values())), meshed[3]
        ids = _iota(whole, order).reshape([*sizes.values()])
        over = [list(sizes).index(axis) for axis in re.findall(r"'([^']+)'", meshed[4])]
        return _rows(np.moveaxis(ids, over, range(-len(over), 0)).reshape(-1, math.prod(ids.shape[d] for d in over)))
    raise ValueError(f"groups of {one.name} are spelt in a way that is not known: {one.rest[:200]}")


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 in an array of these sizes, its dimensions then in this order."""
    return np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes)).transpose(_numbers(order) or None)


def _numbers(text: str | None) -> Sequence[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in groups.tolist())
