"""Rules: from logical axis names to mesh axes. One table a preset; unknown, missing or colliding names raise."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax.parallel import axes as axes_lib
from glmv_jax.parallel.mesh import DATA_AXES
from glmv_jax.trees import slash_path
from glmv_jax.typing import Axes, UserError

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where each logical axis lives. Names that are not in `table` are replicated on purpose, never by misspelling.

    table: logical name -> mesh axis, tuple of mesh axes, or None.
    """

    table: Mapping[str, MeshAxes]

    def __post_init__(self) -> None:
        axes_lib.check(tuple(self.table))

    def spec(self, names: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions carry `names`. Mesh axes that `mesh` lacks are left out.

        Raises ValueError on an unknown name, or when two dimensions would land on the same mesh axis.
        """
        axes_lib.check(names)
        entries: list[MeshAxes] = []
        taken: dict[str, str] = {}
        for name in names:
            rule = self.table.get(name) if name else None
            wanted = (rule,) if isinstance(rule, str) else tuple(rule or ())
            present = tuple(a for a in wanted if a in mesh.shape)
            for axis in present:
                if axis in taken:
                    raise ValueError(f"axes {taken[axis]!r} and {name!r} of {names} both land on mesh axis {axis!r}")
                taken[axis] = name or "?"
            entries.append(present if len(present) > 1 else (present[0] if present else None))
        return PartitionSpec(*entries)

    def shardings(self, mesh: Mesh, names: Axes, shapes: Any = None) -> Any:
        """The tree of NamedSharding for a tree of axis-name tuples; with `shapes`, checks that dimensions divide."""
        is_names = lambda x: isinstance(x, tuple) and all(isinstance(n, (str, type(None))) for n in x)  # noqa: E731
        result = jax.tree.map(lambda n: NamedSharding(mesh, self.spec(n, mesh)), names, is_leaf=is_names)
        if shapes is not None:
            jax.tree_util.tree_map_with_path(_check_divides, shapes, result)
        return result


def _check_divides(path: Any, leaf: Any, sharding: NamedSharding) -> None:
    for dim, entry in zip(leaf.shape, sharding.spec):
        parts = 1
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            parts *= sharding.mesh.shape[axis]
        if dim % parts:
            name = slash_path(path)
            raise UserError(
                f"parameter {name} {tuple(leaf.shape)}: dimension {dim} does not divide over {parts} devices "
                f"({entry}); use another mesh or another rules preset"
            )


PRESETS: dict[str, Rules] = {
    # Parameters replicated, batch split: the laptop, and towers that fit.
    "data": Rules({"batch": DATA_AXES}),
    # Parameters and optimiser state split over `fsdp` along the residual width (never the minor dim of a stack).
    "fsdp": Rules({"batch": DATA_AXES, "embed": "fsdp", "merge": "fsdp", "projection": None}),
    # As fsdp, and heads, MLP and vocabulary split over `tensor`.
    "fsdp_tensor": Rules(
        {
            "batch": DATA_AXES,
            "embed": "fsdp",
            "merge": "fsdp",
            "heads": "tensor",
            "kv_heads": "tensor",
            "mlp": "tensor",
            "vocab": "tensor",
        }
    ),
}


def preset(name: str) -> Rules:
    """A preset by name; UserError naming the known ones."""
    if name not in PRESETS:
        raise UserError(f"rules preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
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


def active_mesh() -> Mesh | None:
    """The mesh of the step that is being traced; None outside of one."""
    active = _ACTIVE.get()
    return None if active is None else active[0]


def device() -> jax.Device:
    """One that the program being traced will run on: those of the mesh in force may not be here."""
    mesh = active_mesh()
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its dimensions pinned to where `names` live; `x` itself when no mesh is in force."""
    active = _ACTIVE.get()
    if active is None:
        axes_lib.check(names)
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.spec(names, mesh)))
