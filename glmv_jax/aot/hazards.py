"""What a compiled program does that nobody meant: each hazard was seen in programs of this size, and costs dearly.

Every finding is one line that says what, how much, and what to do about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from glmv_jax.aot.costs import Schedule, Transfer, flops_of
from glmv_jax.aot.hlo import Array, Computation, Op
from glmv_jax.parallel.scopes import part

_SCORES = 32 << 20  # bytes from which a matrix of attention scores is worth a word
_PAYLOAD = 1 << 20  # bytes from which a transfer is
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Known:
    """What the text of a program does not say. sharded: dims of a parameter -> the mesh axes it is split over, also
    without its axis of stacked layers. positions: patches of a row; patch_widths: numbers of a patch, as read
    and as normalised."""

    sharded: Mapping[tuple[int, ...], tuple[str, ...]]
    positions: int = 0
    patch_widths: frozenset[int] = frozenset()


def warnings(found: Schedule, moved: list[Transfer], known: Known) -> list[str]:
    """One line a hazard, the dearest of a kind first and at most `SHOWN` of a kind."""
    lines = []
    for check in CHECKS:
        of_kind = list(check(found, moved, known))
        lines += of_kind[:SHOWN]
        if len(of_kind) > SHOWN:
            lines.append(f"and {len(of_kind) - SHOWN} more like these")
    if found.seldom:
        names = ", ".join(sorted({part(name)[0] for name in found.seldom}))
        lines.append(f"{len(found.seldom)} loops are taken as not run, as with even loads ({names})")
    if found.unknown:
        names = ", ".join(sorted({part(name)[0] for name in found.unknown}))
        lines.append(
            f"{len(found.unknown)} loops run as often as the data say and are counted once ({names}); "
            "FLOPs and time are too low by what they do"
        )
    return lines


# --- transfers --------------------------------------------------------------------------------------------------------


def whole_gradients(found: Schedule, moved: list[Transfer], known: Known) -> Iterator[str]:
    """All-reduces of a whole parameter's shape over an axis that the parameter is split over."""
    for t in _large(moved, "all-reduce"):
        for array in _operands(t):
            split = known.sharded.get(array.dims, ())
            if set(split) & set(t.axes) and array.bytes >= _PAYLOAD:
                yield (
                    f"all-reduce of {array} {_where(t)}: its parameter is split there, so a reduce-scatter was meant, "
                    "half of that; give the gradient the parameter's sharding"
                )
                break


def gathers_as_sums(found: Schedule, moved: list[Transfer], known: Known) -> Iterator[str]:
    """All-reduces of zeros with one device's part written into them: an all-gather at twice its price."""
    for t in _large(moved, "all-reduce"):
        if any(_is_part_of_zeros(found, t, source) for source in t.step.computation.inputs(t.step.op)):
            yield (
                f"all-reduce of one part among zeros {_where(t)}: an all-gather was meant, half of that; "
                "try --xla xla_tpu_prefer_async_allgather_to_allreduce=true"
            )


def _is_part_of_zeros(found: Schedule, t: Transfer, source: Op) -> bool:
    where = t.step.computation
    if source.opcode == "fusion":
        where = found.module[source.called["calls"]]
        source = where.root
    if source.opcode != "dynamic-update-slice":
        return False
    return where.inputs(source)[0].opcode in ("broadcast", "constant")


def sums_of_which_a_part_is_used(found: Schedule, moved: list[Transfer], known: Known) -> Iterator[str]:
    """All-reduces whose only users take a device's slice of the result."""
    for t in _large(moved, "all-reduce"):
        users = _users(t.step.computation, t.step.op)
        if users and all(user.opcode in ("dynamic-slice", "slice") for user in users):
            yield (
                f"all-reduce of which each device keeps a slice {_where(t)}: a reduce-scatter was meant, half of that"
            )


def _users(computation: Computation, op: Op) -> list[Op]:
    """What works with a result, also when it is passed on."""
    found = []
    for user in computation.users.get(op.name, ()):
        passes = user.opcode in ("get-tuple-element", "bitcast") or user.opcode.endswith("-done")
        found += _users(computation, user) if passes else [user]
    return found


def patches_moved(found: Schedule, moved: list[Transfer], known: Known) -> Iterator[str]:
    """Transfers of pixels: rows of a batch are dealt out by the loader, none has to move."""
    for t in moved:
        wide = [a for a in _operands(t) if len(a.dims) > 1 and a.dims[-1] in known.patch_widths]
        # Others of that width are weights of the first matrix, and their gradients.
        patches = [a for a in wide if a.dtype == "u8" or len(a.dims) > 2 and a.dims[-2] == known.positions]
        if patches and t.sent >= _PAYLOAD:
            yield f"{t.kind} of patches {patches[0]} {_where(t)}: pixels are dealt out by the loader and should stay"


def _large(moved: list[Transfer], kind: str) -> list[Transfer]:
    return sorted((t for t in moved if t.kind == kind and t.operand >= _PAYLOAD), key=lambda t: -t.total)


def _operands(t: Transfer) -> list[Array]:
    return [array for source in t.step.computation.inputs(t.step.op) for array in source.arrays]


def _where(t: Transfer) -> str:
    """Over which axes, how much, from where in the model."""
    name = " ".join(part(t.step.op.scope)).strip()
    return f"over {'+'.join(t.axes)}, {_gb(t.total)} sent in {t.step.times} runs ({name})"


# --- products ---------------------------------------------------------------------------------------------------------


def dense_weight_gradients(found: Schedule, moved: list[Transfer], known: Known) -> Iterator[str]:
    """Backward passes of grouped products that multiply every row with every group's matrix."""
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for step in found.steps:
        scope = step.op.scope
        if "ragged_dot" in scope or "/experts" in scope:
            name, way = part(scope)
            table = {"forward": forward, "backward": backward}.get(way)
            if table is not None:
                table[name] = table.get(name, 0) + step.times * flops_of(found.module, step)
    for name, count in backward.items():
        if forward.get(name) and count > 3 * forward[name]:
            yield (
                f"{name}: the backward pass takes {count / forward[name]:.1f} x the FLOPs of the forward pass, 2 are "
                "needed: the weight gradient is dense over the groups; take a grouped kernel (megablox)"
            )


def scores_in_memory(found: Schedule, moved: list[Transfer], known: Known) -> Iterator[str]:
    """Exponentials inside of attention, which are softmax weights, of matrices too large to stay on the chip."""
    sums: dict[str, tuple[float, Array]] = {}
    for step in found.steps:
        for op in [step.op, *(inner for _, inner in found.module.fused(step.op))]:
            if op.opcode == "exponential" and "attention" in op.scope.lower() and op.bytes >= _SCORES:
                name, _ = part(op.scope)
                sums[name] = sums.get(name, (0.0,))[0] + step.times * op.bytes, op.arrays[0]
    for name, (total, array) in sums.items():
        yield (f"{name}: attention weights {array} pass through memory, {_gb(total)} a call; a fused kernel (splash "
               "attention) keeps them on the chip")  # fmt: skip


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


CHECKS = (whole_gradients, gathers_as_sums, sums_of_which_a_part_is_used, patches_moved, dense_weight_gradients,
          scores_in_memory)  # fmt: skip
