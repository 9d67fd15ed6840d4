"""The text of a compiled program, read into computations and operations. No JAX, no libtpu.

Only what a report needs is understood; what an attribute means is asked of its text. A reader of lines is not enough:
the metadata of a custom call (a Pallas kernel) goes over several lines, of which one begins with a brace as the end of
a computation does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)[ (].*\{$")
_BEGINS = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"T\((\d+),(\d+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")

BYTES = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0,
    "f4e2m1fn": 0.5,
}  # fmt: skip
HOST, VMEM = 5, 1  # memory spaces; 0 is HBM


@dataclasses.dataclass(frozen=True)
class Array:
    """dtype, dims, and how it lies in memory: `layout` as printed."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> float:
        """Without padding."""
        width = 1 if self.dtype.startswith("f8") else BYTES[self.dtype]
        return width * math.prod(self.dims)

    @property
    def padded_bytes(self) -> float:
        """As it lies in memory: the two minor dimensions in whole tiles."""
        tile, order = _TILE.search(self.layout), self.layout.partition(":")[0]
        if not tile or len(self.dims) < 2 or not order:
            return self.bytes
        dims, minor = list(self.dims), [int(i) for i in order.split(",")]
        for axis, size in zip(minor[:2], (int(tile[2]), int(tile[1]))):
            dims[axis] = -(-dims[axis] // size) * size
        return self.bytes / max(1, math.prod(self.dims)) * math.prod(dims)

    @property
    def space(self) -> int:
        found = _SPACE.search(self.layout)
        return int(found[1]) if found else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@functools.lru_cache(maxsize=100_000)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as printed; of a tuple all of them, in order."""
    dims = lambda text: tuple(int(n.strip("<=")) for n in text.split(",") if n)  # noqa: E731
    return tuple(Array(m[1], dims(m[2]), m[3] or "") for m in _ARRAY.finditer(shape))


@dataclasses.dataclass(eq=False)
class Op:
    """One operation: `%name = shape opcode(inside), attributes`."""

    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Of the result."""
        return arrays(self.shape)

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations by the attribute that names them; branches as branch0, branch1, ..."""
        found = {key: name for key, name in _CALLED.findall(self.attributes)}
        if branches := _BRANCHES.search(self.attributes):
            names = [name.strip().lstrip("%") for name in branches[1].split(",")]
            found |= {f"branch{i}": name for i, name in enumerate(names)}
        return found

    @property
    def scope(self) -> str:
        """op_name of the metadata: which line of the model it came from; "" without."""
        return self.attribute(r'op_name="([^"]*)"')

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes, "" without."""
        found = _compiled(pattern).search(self.attributes)
        return found[1] if found else ""


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


class Computation:
    """Operations in order, by name in `at`; in a scheduled program the order of execution."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ops: list[Op] = []
        self.at: dict[str, Op] = {}

    def add(self, op: Op) -> None:
        self.ops.append(op)
        self.at[op.name] = op

    @functools.cached_property
    def root(self) -> Op:
        return next(op for op in self.ops if op.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Op]:
        return {int(op.inside): op for op in self.ops if op.opcode == "parameter"}

    def inputs(self, op: Op) -> list[Op]:
        """The operations that give its operands."""
        return [self.at[name] for name in op.operands if name in self.at]

    @functools.cached_property
    def users(self) -> dict[str, list[Op]]:
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            for name in op.operands:
                found.setdefault(name, []).append(op)
        return found


class Module:
    """A compiled program."""

    def __init__(self, computations: dict[str, Computation], entry: str, partitions: int) -> None:
        self.computations, self.partitions = computations, partitions
        self.entry = computations[entry]

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def fused(self, op: Op) -> Iterator[tuple[Computation, Op]]:
        """What a fusion does, those within it included; nothing for other operations."""
        if op.opcode == "fusion":
            inner = self[op.called["calls"]]
            for each in inner.ops:
                yield inner, each
                yield from self.fused(each)


def parse(text: str) -> Module:
    """Reads the text of `compiled.as_text()`. ValueError when it holds no program, or a line is not understood."""
    computations: dict[str, Computation] = {}
    here, entry, pending = None, "", ""
    for line in text.splitlines():
        if here is None:
            if (header := _HEADER.match(line)) and not line.startswith("HloModule"):
                here = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
            continue
        line = f"{pending}\n{line}" if pending else line
        if not pending and line.startswith("}"):
            here = None
        elif not _closed(line):
            pending = line
        else:
            pending = ""
            if line.strip():
                here.add(_operation(line))
    if not entry or pending or here is not None:
        raise ValueError("this is not the text of a whole compiled program")
    partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _closed(line: str) -> bool:
    """Whether an operation ends here: outside of strings no brace is open."""
    if line.count("{") == line.count("}"):
        return True
    bare = _STRING.sub("", line)
    return '"' not in bare and bare.count("{") <= bare.count("}")


def _operation(line: str) -> Op:
    begins = _BEGINS.match(line)
    if not begins:
        raise ValueError(f"not an operation: {line[:200]}")
    start = begins.end()
    stop = _balanced(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, stop)
    if not opcode:
        raise ValueError(f"no opcode: {line[:200]}")
    end = _balanced(line, opcode.end() - 1)
    inside = line[opcode.end() : end - 1]
    return Op(begins[2], line[start:stop], opcode[1], inside, line[end:], bool(begins[1]))


def _balanced(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    raise ValueError(f"a parenthesis stays open: {text[:200]}")


_PARENTHESIS = re.compile(r'[()]|"(?:\\.|[^"\\])*"')
