"""What a scheduled program does, with how often: its operations, their FLOPs, the compiler's cycles, its transfers.

The compiler's estimate stands at the scheduled level: in the entry computation, in the bodies of loops and in what they
call, never inside of fusions. It is missing for custom kernels, transfers, sorts and some copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from glmv_jax.aot import groups as groups_lib
from glmv_jax.aot.flops import flops
from glmv_jax.aot.hlo import Computation, Module, Op
from glmv_jax.aot.loops import trip_count

CATEGORIES = ("matmul", "custom kernel", "copies and layout", "reduce", "other")
_CYCLES = r'"estimated_cycles":"(\d+)"'
SELDOM = "seldom"  # in the scope of a loop that in a usual step is not run: `models.experts`
_BETWEEN_SLICES = r'_xla_megascale_transfer_type="(\w+)"'
_ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'
_ASYNC_DONE = 'custom_call_target="AsyncCollectiveDone"'
_KERNEL = 'custom_call_target="tpu_custom_call"'
_NO_ESTIMATE = 9223372036854775807
_MOVES = frozenset(
    "copy copy-start copy-done transpose bitcast bitcast-convert reshape slice slice-start slice-done dynamic-slice "
    "dynamic-update-slice dynamic-slice-start dynamic-slice-done concatenate pad broadcast convert parameter constant "
    "tuple get-tuple-element iota reverse async-start async-done async-update".split()
)
_PRODUCTS = ("dot", "convolution")
_REDUCES = ("reduce", "reduce-window")
WORK = ("while", "fusion", "convolution", "dot", "custom-call", "call")  # what can hide a transfer
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation of the schedule. times: runs in one call of the program. thread: "" is the TensorCore's."""

    computation: Computation
    op: Op
    times: int
    thread: str = ""
    asynchronous: bool = False


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective. kind: of KINDS, or as the network between slices calls it; sent: bytes a device sends in a run.

    operand: bytes of a device's own part. groups: rows of partitions, of a permute from whom to whom; None between
    slices. members: partitions of a row. axes: mesh axes along which they differ.
    slices: whether a group reaches over slices. hidden: it is asynchronous and other work stands before it is waited
    for.
    """

    step: Step
    kind: str
    operand: float
    sent: float
    members: int
    axes: tuple[str, ...]
    slices: bool
    asynchronous: bool
    hidden: bool
    groups: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def total(self) -> float:
        """Bytes a device sends in one call of the program."""
        return self.sent * self.step.times


@dataclasses.dataclass(frozen=True)
class Schedule:
    """loops: how often each loop runs a time it is entered, in order; unknown: loops of which that cannot be told;
    seldom: those that say so (`SELDOM`), which count as not run."""

    module: Module
    steps: list[Step]
    loops: list[int]
    unknown: list[str]
    seldom: list[str] = dataclasses.field(default_factory=list)


def schedule(module: Module) -> Schedule:
    """Walks the program from its entry. A loop of unknown length counts once, every branch of a conditional too; but
    loops that only uneven loads of experts enter count not at all."""
    found = Schedule(module, [], [], [])
    _walk(found, module.entry, 1, "", False)
    return found


def _walk(found: Schedule, computation: Computation, times: int, thread: str, asynchronous: bool) -> None:
    for op in computation.ops:
        found.steps.append(Step(computation, op, times, thread, asynchronous))
        if op.opcode == "while":
            turns = trip_count(found.module, computation, op)
            if turns is None and SELDOM in op.scope:
                found.seldom.append(op.scope)
                turns = 0
            elif turns is None:
                found.unknown.append(op.scope or op.name)
            else:
                found.loops.append(turns)
            _walk(found, found.module[op.called["body"]], times * (1 if turns is None else turns), thread, asynchronous)
        elif op.opcode in ("call", "conditional"):
            for name in op.called.values():
                _walk(found, found.module[name], times, thread, asynchronous)
        elif op.opcode in ("async-start", "call-start"):
            thread_of = op.attribute(r'async_execution_thread="([^"]*)"')
            for name in op.called.values():
                _walk(found, found.module[name], times, thread if thread_of in ("", "main") else thread_of, True)


# --- cycles and FLOPs -------------------------------------------------------------------------------------------------


def cycles(op: Op) -> int | None:
    """The compiler's estimate of one run, None without."""
    number = int(op.attribute(_CYCLES) or _NO_ESTIMATE)
    return None if number == _NO_ESTIMATE else number


def category(module: Module, op: Op) -> str:
    """Which of CATEGORIES an operation of the schedule is; a fusion by the most expensive thing in it."""
    ops = [op] if op.opcode != "fusion" else [inner for _, inner in module.fused(op)]
    opcodes = {op.opcode for op in ops}
    if opcodes & {*_PRODUCTS}:
        return "matmul"
    if any(op.opcode == "custom-call" and _KERNEL in op.attributes for op in ops):
        return "custom kernel"
    if opcodes & {*_REDUCES}:
        return "reduce"
    return "copies and layout" if opcodes <= _MOVES else "other"


def flops_of(module: Module, step: Step) -> float:
    """FLOPs of one run of an operation of the schedule, those of its fusion included."""
    return flops(step.computation, step.op) + sum(flops(where, op) for where, op in module.fused(step.op))


def traffic(module: Module, step: Step) -> float:
    """Bytes that one run reads from main memory and writes to it, if nothing stays on the chip in between.

    What lies in vector memory is left out. Of an operand that is only sliced the slice counts, of a result that updates
    a part of an operand the part.
    """
    op, computation = step.op, step.computation
    if op.opcode in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"):
        return 0.0
    if op.opcode.endswith(("-start", "-done")):
        return _in_memory(op) / 2 if op.opcode.endswith("-start") else 0.0
    if op.opcode == "fusion":
        inner = module[op.called["calls"]]
        read = sum(_read(inner, inner.parameters[i], x) for i, x in enumerate(computation.inputs(op)))
        return read + _written(inner, op)
    if op.opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * _in_memory(op)
    if op.opcode == "dynamic-update-slice":
        return 2 * _in_memory(computation.inputs(op)[1])
    return _in_memory(op) + sum(map(_in_memory, computation.inputs(op)))


def _in_memory(op: Op) -> float:
    return sum(array.bytes for array in op.arrays if array.space == 0)


def _read(inner: Computation, parameter: Op, source: Op) -> float:
    """Of an operand of a fusion."""
    users = [user for user in inner.users.get(parameter.name, ())]
    if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return sum(user.bytes for user in users) if _in_memory(source) else 0.0
    if users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users):
        return 0.0  # written in place
    return _in_memory(source)


def _written(inner: Computation, fusion: Op) -> float:
    root = inner.root
    while root.opcode == "bitcast":
        root = inner.inputs(root)[0]
    if root.opcode == "dynamic-update-slice" and _in_memory(fusion):
        return inner.inputs(root)[1].bytes
    return _in_memory(fusion)


# --- transfers --------------------------------------------------------------------------------------------------------


def transfers(found: Schedule, mesh: Mapping[str, int], slice_of: Sequence[int] = ()) -> list[Transfer]:
    """Every collective of the program, in order. mesh: axis -> size. slice_of: each partition's slice, if several.

    Raises: groups.Unparsed.
    """
    result = []
    for step in found.steps:
        op = step.op
        if (kind := op.opcode.removesuffix("-start")) in KINDS:
            result.append(_transfer(found, step, step.computation, op, kind, mesh, slice_of))
        elif op.opcode == "send" and op.attribute(_BETWEEN_SLICES):
            size = step.computation.inputs(op)[0].bytes
            kind = op.attribute(_BETWEEN_SLICES).lower().replace("_", "-")
            result.append(Transfer(step, kind, size, size, len(set(slice_of)), (), True, True, _work_follows(step)))
        else:
            for inner, held in _begun(found.module, op):
                kind = held.opcode.removesuffix("-start")
                result.append(_transfer(found, step, inner, held, kind, mesh, slice_of))
    return result


def _begun(module: Module, fusion: Op) -> list[tuple[Computation, Op]]:
    """The collectives of a fusion; of one that other fusions carry on and end, only where it begins."""
    inside = list(module.fused(fusion))
    held = [(where, op) for where, op in inside if op.opcode.removesuffix("-start") in KINDS]
    if any(_ASYNC_START in op.attributes for _, op in inside):
        return held
    ends = any(_ASYNC_DONE in op.attributes for _, op in inside)
    return [] if ends else [(where, op) for where, op in held if "async_collective_fusion" not in where.name]


def _transfer(
    found: Schedule, step: Step, where: Computation, op: Op, kind: str, mesh: Mapping[str, int], slice_of: Sequence[int]
) -> Transfer:
    within = " ".join((step.op.name, step.op.called.get("calls", ""))) if op is not step.op else ""
    begins = any(_ASYNC_START in inner.attributes for _, inner in found.module.fused(step.op))
    if kind == "all-reduce" and "all-reduce-scatter" in within:
        kind = "reduce-scatter"  # so the compiler writes one
    if kind == "collective-permute":
        members = groups_lib.pairs(op.attributes)
    else:
        members = groups_lib.groups(op.attributes, found.module.partitions)
    operand = sum(source.bytes for source in where.inputs(op))
    if kind == "ragged-all-to-all":  # the rows there are; the smaller buffer holds them, on either way
        operand = min(source.bytes for source in where.inputs(op)[:2])
    n = members.shape[1]
    asynchronous = step.asynchronous or op.opcode.endswith("-start") or begins
    hidden = asynchronous and (step.asynchronous or _work_follows(step))
    axes = groups_lib.axes_between(members, mesh) if mesh else ()
    crosses = len(slice_of) > 0 and groups_lib.crosses(members, slice_of)
    return Transfer(step, kind, operand, sent(kind, operand, n), n, axes, crosses, asynchronous, hidden, members)


def sent(kind: str, operand: float, n: int) -> float:
    """Bytes that each of n devices sends when all pass on what they have around a ring; operand: a device's part."""
    return {
        "all-gather": operand * (n - 1),
        "all-reduce": 2 * operand * (n - 1) / n,
        "collective-permute": operand,
        "collective-broadcast": operand,
    }.get(kind, operand * (n - 1) / n)


def _work_follows(step: Step) -> bool:
    """Whether other work stands between a transfer's start and the operation that waits for it."""
    ops = step.computation.ops
    begin = ops.index(step.op)
    for op in ops[begin + 1 :]:
        if op.name.startswith("async-collective-done") or op.opcode.endswith("-done") and step.op.name in op.operands:
            return False
        if op.opcode in WORK:
            return True
    return False
