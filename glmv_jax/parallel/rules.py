"""Rules: from logical axis names to mesh axes. One table a preset; unknown, missing or colliding names raise."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from glmv_jax.parallel import axes as axes_lib
from glmv_jax.parallel.mesh import DATA_AXES, MESH_AXES
from glmv_jax.trees import slash_path
from glmv_jax.typing import Axes, UserError

MeshAxes = str | tuple[str, ...] | None


def entry_axes(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes that one dimension is split over, by a rule or an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where each logical axis lives. Names that are not in `table` are replicated on purpose, never by misspelling.

    table: logical name -> mesh axis, tuple of mesh axes, or None.
    microbatches, repeats, ends: of a pipeline, see `parallel.pipeline`; 0 microbatches: up to 4 a stage.
    """

    table: Mapping[str, MeshAxes]
    microbatches: int = 0
    repeats: int = 1
    ends: str = "rows"

    def __post_init__(self) -> None:
        axes_lib.check(tuple(self.table))
        if self.ends not in ("rows", "stages"):
            raise UserError(f"pipeline.ends={self.ends!r} is not known; choose rows or stages")

    def without(self, axis: str) -> Rules:
        """The same, and nothing lives on this mesh axis (code in which it is manual)."""
        table = {name: tuple(a for a in entry_axes(rule) if a != axis) for name, rule in self.table.items()}
        return dataclasses.replace(self, table=table)

    def spec(self, names: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions carry `names`. Mesh axes that `mesh` lacks are left out.

        Raises ValueError on an unknown name, or when two dimensions would land on the same mesh axis.
        """
        axes_lib.check(names)
        entries: list[MeshAxes] = []
        taken: dict[str, str] = {}
        for name in names:
            rule = self.table.get(name) if name else None
            present = tuple(a for a in entry_axes(rule) if a in mesh.shape)
            for axis in present:
                if axis in taken:
                    raise ValueError(f"axes {taken[axis]!r} and {name!r} of {names} both land on mesh axis {axis!r}")
                taken[axis] = name or "?"
            entries.append(present if len(present) > 1 else (present[0] if present else None))
        return PartitionSpec(*entries)

    def shardings(self, mesh: Mesh, names: Axes, shapes: Any = None) -> Any:
        """The tree of NamedSharding for a tree of axis-name tuples; with `shapes`, checks that dimensions divide.

        Layers that do not divide over the stages of a pipeline are split over them as over fsdp, along their widths;
        `shapes` are needed to see that.
        """
        is_names = lambda x: isinstance(x, tuple) and all(isinstance(n, (str, type(None))) for n in x)  # noqa: E731
        if shapes is None:
            return jax.tree.map(lambda n: NamedSharding(mesh, self.spec(n, mesh)), names, is_leaf=is_names)

        def place(n: tuple[str | None, ...], x: Any) -> NamedSharding:
            return NamedSharding(mesh, (self._by_width() if self._uneven(n, x, mesh) else self).spec(n, mesh))

        result = jax.tree.map(place, names, shapes, is_leaf=is_names)
        jax.tree_util.tree_map_with_path(_check_divides, shapes, result)
        return result

    def _uneven(self, names: tuple[str | None, ...], x: Any, mesh: Mesh) -> bool:
        over = [axis for axis in entry_axes(self.table.get(_LAYERS)) if axis in mesh.shape]
        return _LAYERS in names and bool(x.shape[names.index(_LAYERS)] % math.prod(mesh.shape[axis] for axis in over))

    def _by_width(self) -> Rules:
        """The same, and what layers are split over splits their widths, as the last axis, so that a part of a width
        goes to another stage as it lies."""
        over = entry_axes(self.table.get(_LAYERS))
        widths = {name: (*entry_axes(self.table.get(name)), *over) for name in (*_WIDTHS, *_EXPERT_WIDTHS)}
        return dataclasses.replace(self, table={**self.table, **widths, _LAYERS: None})


def _check_divides(path: Any, leaf: Any, sharding: NamedSharding) -> None:
    for dim, entry in zip(leaf.shape, sharding.spec):
        parts = math.prod(sharding.mesh.shape[axis] for axis in entry_axes(entry))
        if dim % parts:
            name = slash_path(path)
            raise UserError(
                f"parameter {name} {tuple(leaf.shape)}: dimension {dim} does not divide over {parts} devices "
                f"({' x '.join(entry_axes(entry))}), over {math.gcd(dim, parts)} it does; "
                "give mesh.data the rest of them, or take another rules preset"
            )


# What lives on each mesh axis that splits parameters; a preset is a choice of these. A dimension that two of them split
# is split by the one that stands first here, and its parts by the next.
_LAYERS = "pipeline"
_WIDTHS = ("embed", "merge", "from_latent", "from_heads", "from_mlp")
_EXPERT_WIDTHS = ("expert_embed", "expert_mlp")
_SPLITS: dict[str, dict[str, str]] = {
    "tensor": dict.fromkeys(("heads", "from_heads", "kv_heads", "mlp", "from_mlp", "vocab", "expert_mlp"), "tensor"),
    # Parameters and optimiser state along what a matrix reads, never along what it makes: XLA sums gradients whole
    # where the part that a device keeps is one of the last dimension.
    "fsdp": dict.fromkeys((*_WIDTHS, *_EXPERT_WIDTHS), "fsdp"),
    # The positions of a row (`parallel.context`), and parameters as over fsdp.
    "context": dict.fromkeys(("length", *_WIDTHS, *_EXPERT_WIDTHS), "context"),
    # Experts; and all that is no expert as over fsdp, for every device has rows of its own.
    "expert": dict.fromkeys(("expert", *_WIDTHS), "expert"),
}
_PARTS = [axis for axis in MESH_AXES if axis in _SPLITS]


def _choice(parts: Sequence[str]) -> Rules:
    table: dict[str, tuple[str, ...]] = {}
    for axis in (axis for axis in _SPLITS if axis in parts):
        for name in _SPLITS[axis]:
            table[name] = (*table.get(name, ()), axis)
    return Rules({"batch": DATA_AXES, "pipeline": "stage", **table})


# "data": parameters replicated, the batch split: the laptop, and towers that fit. The others are called by what they
# split, "fsdp", "fsdp_tensor", "fsdp_expert_tensor": every choice there is. An axis that a mesh lacks does nothing.
#
# "serve": where nothing learns, which is where tokens are drawn one by one. A matrix is read where it lies: experts on
# `expert`, heads, hidden width and vocabulary over `tensor`, and the rest whole on every device, for to gather it would
# take longer than the token. All axes but `tensor` (and `context`) split rows; so does what they remember, and its
# heads lie where those of its matrices do (`parallel.caches`).
SERVE = "serve"
PRESETS: dict[str, Rules] = {"data": _choice(())} | {
    "_".join(parts): _choice(parts) for n in range(len(_PARTS)) for parts in itertools.combinations(_PARTS, n + 1)
}
PRESETS[SERVE] = Rules({"batch": DATA_AXES, "expert": "expert", **_SPLITS["tensor"]})


def preset(name: str) -> Rules:
    """A preset by name; UserError naming the known ones."""
    if name not in PRESETS:
        parts = ", ".join(_PARTS)
        raise UserError(f"rules preset {name!r} is not known; choose data, or join of {parts} what the mesh has, in "
                        f"this order, as in {'_'.join(_PARTS)}; or {SERVE} where nothing learns")  # fmt: skip
    return PRESETS[name]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the data axes of `mesh`, everything else whole."""
    return NamedSharding(mesh, PRESETS["data"].spec(("batch",), mesh))


# Activations are constrained inside models/ by name; the mesh and rules in force are set once around the trace.
_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("glmv_rules", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Within the block, `constrain` pins activations to `mesh` by `rules` (wrap the tracing of a step in it)."""
    token = _ACTIVE.set((mesh, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> tuple[Mesh, Rules] | None:
    """The mesh and the rules of the step that is being traced; None outside of one."""
    return _ACTIVE.get()


def in_force() -> tuple[Mesh, Rules]:
    """The same for code that runs under a mesh only. RuntimeError outside of a step."""
    if (found := active()) is None:
        raise RuntimeError("no mesh is in force here; trace this within rules.use(mesh, rules)")
    return found


def active_mesh() -> Mesh | None:
    """The mesh alone."""
    found = active()
    return None if found is None else found[0]


def device() -> jax.Device:
    """One that the program being traced will run on: those of the mesh in force may not be here."""
    mesh = active_mesh()
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its dimensions pinned to where `names` live; `x` itself when no mesh is in force."""
    if (found := active()) is None:
        axes_lib.check(names)
        return x
    mesh, rules = found
    inside = jax.sharding.get_abstract_mesh()  # in shard_map: the mesh that knows which of its axes are manual
    mesh = inside if inside.manual_axes else mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.spec(names, mesh)))
