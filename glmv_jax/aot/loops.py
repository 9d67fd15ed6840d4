"""How often the body of a loop runs, read from the loop's condition.

A loop of JAX counts: its condition compares the counter that it carries with a constant, or with something else that it
carries and never changes. Where a known_trip_count stands beside the loop that is taken; where the end depends on data
nothing can be said, and where it may come earlier than the counter says the counter is believed.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from glmv_jax.aot.hlo import Computation, Module, Op

_KNOWN = r'"known_trip_count":\{"n":"(\d+)"\}'
_PASSING = frozenset("copy copy-start copy-done convert bitcast bitcast-convert reshape optimization-barrier".split())


class _Value(NamedTuple):
    """A number that is known, or the index of what the loop carries."""

    number: int | None = None
    carried: int | None = None


def trip_count(module: Module, caller: Computation, loop: Op) -> int | None:
    """Of a while operation of `caller`; None when it cannot be told."""
    if known := loop.attribute(_KNOWN):
        return int(known)
    condition = module[loop.called["condition"]]
    compare = _Look(module, condition).comparison()
    if compare is None:
        return None
    left, right, direction = compare
    if left.carried is None and right.carried is not None:
        left, right, direction = right, left, {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if left.carried is None:
        return None
    begin = _initial(module, caller, loop, left.carried)
    end = right.number if right.carried is None else _initial(module, caller, loop, right.carried)
    step = _step(module, module[loop.called["body"]], left.carried)
    if end is None or step is None:
        return None
    begin = 0 if begin is None else begin  # where it comes from further out: JAX counts from 0
    distance = end - begin + (1 if direction == "LE" else -1 if direction == "GE" else 0)
    return max(0, math.ceil(distance / step))


class _Look:
    """Follows values of one computation, into fusions and out of them again."""

    def __init__(self, module: Module, computation: Computation, given: dict[int, _Value] | None = None) -> None:
        self.module, self.computation, self.given = module, computation, given

    def value(self, op: Op | None) -> _Value:
        while op is not None and op.opcode in _PASSING:
            op = self.operand(op, 0)
        if op is None:
            return _Value()
        if op.opcode == "constant":
            return _Value(number=int(op.inside)) if re.fullmatch(r"-?\d+", op.inside) else _Value()
        if op.opcode == "parameter" and self.given is not None:
            return self.given.get(int(op.inside), _Value())
        if op.opcode == "get-tuple-element":
            source = self.operand(op, 0)
            if source is not None and source.opcode == "parameter" and self.given is None:
                return _Value(carried=int(op.attribute(r"index=(\d+)")))
        return _Value()

    def operand(self, op: Op, i: int) -> Op | None:
        return self.computation.at.get(op.operands[i]) if i < len(op.operands) else None

    def within(self, fusion: Op) -> _Look:
        """The same inside a fusion of this computation."""
        given = {i: self.value(self.operand(fusion, i)) for i in range(len(fusion.operands))}
        return _Look(self.module, self.module[fusion.called["calls"]], given)

    def comparison(self) -> tuple[_Value, _Value, str] | None:
        """(left, right, direction) of what the condition's root compares."""
        root = self.computation.root
        while root is not None and root.opcode in _PASSING:
            root = self.operand(root, 0)
        if root is not None and root.opcode == "fusion":
            return self.within(root).comparison()
        return self._compared(root)

    def _compared(self, root: Op | None) -> tuple[_Value, _Value, str] | None:
        if root is not None and root.opcode == "and":  # and something that ends it earlier: then at most so often
            return self._compared(self.operand(root, 0)) or self._compared(self.operand(root, 1))
        if root is None or root.opcode != "compare":
            return None
        left, right = (self.value(self.operand(root, i)) for i in (0, 1))
        return left, right, root.attribute(r"direction=(\w+)")


def _initial(module: Module, caller: Computation, loop: Op, index: int) -> int | None:
    """What the loop carries at `index` when it begins, if that is a constant of its caller."""
    carried = caller.at.get(loop.operands[0])
    while carried is not None and carried.opcode in _PASSING:
        carried = caller.at.get(carried.operands[0])
    if carried is None or carried.opcode != "tuple":
        return None
    return _Look(module, caller).value(caller.at.get(carried.operands[index])).number


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What a turn adds to the counter; None when it does something else."""
    look, root = _Look(module, body), body.root
    if root.opcode != "tuple":
        return None
    op = body.at.get(root.operands[index])
    while op is not None and op.opcode in _PASSING:
        op = look.operand(op, 0)
    inner = 0
    if op is not None and op.opcode == "get-tuple-element":  # one of several results of a fusion
        inner, op = int(op.attribute(r"index=(\d+)")), look.operand(op, 0)
    if op is not None and op.opcode == "fusion":
        look = look.within(op)
        op = look.computation.root
        if op.opcode == "tuple":
            op = look.operand(op, inner)
    if op is None or op.opcode not in ("add", "subtract"):
        return None
    left, right = (look.value(look.operand(op, i)) for i in (0, 1))
    if left.carried != index:
        left, right = right, left
    if left.carried != index or right.number is None:
        return None
    return right.number if op.opcode == "add" else -right.number
