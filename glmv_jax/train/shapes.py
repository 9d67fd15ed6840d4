"""`glmv shapes`: where every array of a run would live, on a mesh of any size, and which are whole where they need not
be. Nothing is allocated, and the devices need not be here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import pipeline
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.rules import entry_axes
from glmv_jax.train import loop, lora, main, teachers
from glmv_jax.train.disk import size_text
from glmv_jax.train.stages.base import Stage
from glmv_jax.trees import flatten
from glmv_jax.typing import UserError

# The axes that are there to split parameters; over `data`, and but for layers over `stage`, they are whole on purpose,
# and a mesh with `context` needs rules for it anyway.
SPLITTING = ("fsdp", "expert", "tensor")
KINDS = ("parameter", "optimiser", "carried", "constant")


@dataclasses.dataclass(frozen=True)
class Row:
    """One array. kind: of KINDS. of: for optimiser state the path of its parameter, "" where it belongs to none. axes:
    logical names a dimension, where known. spec: mesh axes a dimension. bytes: of the whole; here: on a device."""

    kind: str
    path: str
    of: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...] | None
    spec: tuple[tuple[str, ...], ...]
    bytes: int
    here: int


def rows(stage: Stage, mesh: AbstractMesh) -> list[Row]:
    """Every array of the stage's state and of its constants."""
    placement, _, _ = loop.prepare(stage, mesh)
    state = placement.abstract
    axes = _named(stage.logical_axes())
    shapes = {path: tuple(x.shape) for path, x in flatten(state.params).items()}
    found = [_row("parameter", path, x, x.sharding, axes[path]) for path, x in flatten(state.params).items()]
    for path, x in flatten(state.opt_state).items():
        of = _owner(path, tuple(x.shape), shapes)
        found.append(_row("optimiser", path, x, x.sharding, axes.get(of), of))
    found += [_row("carried", path, x, x.sharding) for path, x in (("step", state.step), *flatten(state.extra).items())]
    own = stage.constant_axes()
    names = {} if own is None else _named(own)
    where = flatten(placement.constants)
    found += [_row("constant", path, x, where[path], names.get(path)) for path, x in flatten(stage.constants()).items()]
    return found


def whole(
    table: Sequence[Row], mesh: AbstractMesh, limit: int, allowed: Sequence[str] = ()
) -> Iterator[tuple[Row, str]]:
    """Arrays of more than `limit` bytes a device that are whole along an axis of SPLITTING which divides one of their
    dimensions, with that axis, largest first; without those whose path `allowed` (regular expressions) match."""
    for row in sorted(table, key=lambda row: -row.here):
        may = any(re.fullmatch(regex, row.of or row.path) for regex in allowed)
        if not may and (axis := _unused(row, mesh, limit)):
            yield row, axis


def _unused(row: Row, mesh: AbstractMesh, limit: int) -> str | None:
    used = {axis for axes in row.spec for axis in axes}
    local = [n // math.prod(mesh.shape[a] for a in axes) for n, axes in zip(row.shape, row.spec)]
    for axis in SPLITTING if row.here > limit else ():
        parts = mesh.shape.get(axis, 1)
        if parts > 1 and axis not in used and any(n % parts == 0 for n in local):
            return axis
    return None


def run(
    cfg: ConfigDict, devices: int = 0, *, biggest: bool = False, limit: int = 64 << 20, allowed: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Prints the table and returns all of it as JSON can hold it, with what `whole` finds and, as "refusal", a line
    that says why such a layout is none to train with and what would do ("" when it is).

    devices: how many the mesh is of, 0: what its sizes multiply to. biggest: largest first, else by path.
    Raises: UserError for a config that does not fit.
    """
    for regex in allowed:
        try:
            re.compile(regex)
        except re.error as error:
            raise UserError(f"--allow-replicated {regex!r} is no regular expression: {error}") from None
    mesh = mesh_lib.abstract_mesh(dict(cfg.get("mesh", {"data": -1})), devices)
    table = rows(_stage(cfg), mesh)
    rules = cfg.get("rules", "data")
    console = console or Console()
    if not console.is_terminal:  # a file is as wide as it has to be
        console.width = max(console.width, 200)
    _print(table, mesh, rules, biggest, console)
    if text := _pipeline(table, mesh, cfg.get("pipeline", {}).get("repeats", 1)):
        console.print(Text(text), soft_wrap=True)
    report = {
        "mesh": dict(mesh.shape), "devices": mesh.size, "rules": rules, "totals": totals(table),
        "arrays": [dataclasses.asdict(row) for row in table],
    }  # fmt: skip
    refused = list(whole(table, mesh, limit, allowed))
    return report | {"replicated": [{"path": row.path, "axis": axis, "here": row.here} for row, axis in refused],
                     "refusal": _refusal(refused, mesh, rules, limit)}  # fmt: skip


def totals(table: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Of each kind: numbers, bytes of the whole, bytes on a device."""
    of = lambda kind: [row for row in table if row.kind == kind]  # noqa: E731
    return {
        kind: {"numbers": sum(math.prod(row.shape) for row in of(kind)), "bytes": sum(row.bytes for row in of(kind)),
               "here": sum(row.here for row in of(kind))}
        for kind in KINDS
    }  # fmt: skip


def _stage(cfg: ConfigDict) -> Stage:
    more = {"make": teachers.abstract} if cfg.stage == "mim" else {}  # a public teacher is not needed, only its sizes
    return lora.adapted(main.stage_class(cfg.stage)(cfg, **more))


def _named(axes: Any) -> dict[str, tuple[str | None, ...]]:
    return flatten(axes, is_leaf=lambda x: isinstance(x, tuple))


def _owner(path: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> str:
    """The parameter that a part of the optimiser state is of: its path ends in the parameter's, and shapes agree."""
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if shapes.get(end) == shape), "")


def _row(kind: str, path: str, x: Any, sharding: Any, axes: Any = None, of: str = "") -> Row:
    entries = (*sharding.spec, *[None] * (len(x.shape) - len(sharding.spec)))
    spec = tuple(entry_axes(entry) for entry in entries)
    size = math.prod(x.shape) * np.dtype(x.dtype).itemsize
    parts = math.prod(sharding.mesh.shape[axis] for axes in spec for axis in axes)
    return Row(kind, path, of, tuple(x.shape), str(x.dtype), axes, spec, size, size // parts)


# --- what a person reads ----------------------------------------------------------------------------------------------


def _print(table: Sequence[Row], mesh: AbstractMesh, rules: str, biggest: bool, console: Console) -> None:
    """A row a parameter, with its optimiser state beside it, and one for each other array that is not a counter."""
    state: dict[str, int] = {}
    for row in table:
        state[row.of] = state.get(row.of, 0) + row.here
    shown = [row for row in table if row.kind != "optimiser" and (row.kind == "parameter" or row.shape)]
    if biggest:
        shown.sort(key=lambda row: -row.here - state.get(row.path, 0) * (row.kind == "parameter"))
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for name in ("array", "shape", "dtype", "axes", "over", "a device", "its optimiser state"):
        right = name in ("a device", "its optimiser state")
        drawn.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in shown:
        mine = size_text(state[row.path]) if row.kind == "parameter" and row.path in state else ""
        over = " ".join(",".join(axes) or "-" for axes in row.spec)
        axes = " ".join(name or "-" for name in row.axes or ())
        name = row.path if row.kind == "parameter" else f"{row.kind} {row.path}"
        sizes = "x".join(map(str, row.shape)) or "scalar"
        drawn.add_row(*map(Text, (name, sizes, row.dtype, axes, over, size_text(row.here), mine)))
    console.print(drawn)
    sizes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
    console.print(Text(f"{mesh.size} devices, {sizes}; rules {rules}"), soft_wrap=True)
    for kind, sums in totals(table).items():
        if sums["bytes"]:
            text = f"{sums['numbers']:,} numbers, {size_text(sums['bytes'])}; {size_text(sums['here'])} a device"
            console.print(Text(f"{kind:<10} {text}"), soft_wrap=True)
    here = sum(row.here for row in table)
    console.print(Text(f"{'all':<10} {size_text(here)} a device, before gradients and activations"), soft_wrap=True)


def _pipeline(table: Sequence[Row], mesh: AbstractMesh, repeats: int) -> str:
    """What layers that do not divide over the stages cost; "" when they do, or there are none."""
    found = [row.shape[row.axes.index(pipeline.LAYERS)] for row in table if row.axes and pipeline.LAYERS in row.axes]
    stages = mesh.shape.get(pipeline.AXIS, 1)
    if not found or stages == 1 or not (more := pipeline.padding(found[0], stages, repeats)):
        return ""
    each = (found[0] + more) // stages
    return (f"pipeline   {found[0]} layers on {stages} stages are {each} on each, {more} of all skipped: "
            f"{more / found[0]:.1%} more time in them than if they divided, and they are stored by widths")  # fmt: skip


def _refusal(refused: Sequence[tuple[Row, str]], mesh: AbstractMesh, rules: str, limit: int) -> str:
    if not refused:
        return ""
    row, axis = refused[0]
    name = row.of or row.path
    better = [preset for preset, table in rules_lib.PRESETS.items() if _fits(row, table, mesh, limit)]
    remedy = f"set rules={better[0]}" if better else "use another mesh"
    others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    what = f"{row.kind} {name}" if row.kind != "optimiser" else f"optimiser state of {name}"
    size = f"{'x'.join(map(str, row.shape))}{others}"
    return (f"{what} {size} is whole on all {mesh.shape[axis]} devices of {axis} under rules={rules}, "
            f"{size_text(row.here)} each; {remedy}, or --allow-replicated {name}")  # fmt: skip


def _fits(row: Row, rules: rules_lib.Rules, mesh: AbstractMesh, limit: int) -> bool:
    """Whether these rules would split it as far as they have to."""
    if row.axes is None:
        return False
    spec = tuple(entry_axes(entry) for entry in rules.spec(row.axes, mesh))
    parts = [math.prod(mesh.shape[axis] for axis in axes) for axes in spec]
    there = dataclasses.replace(row, spec=spec, here=row.bytes // math.prod(parts))
    return all(n % p == 0 for n, p in zip(row.shape, parts)) and _unused(there, mesh, limit) is None
