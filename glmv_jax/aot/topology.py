"""TPU slices by name, described to the compiler: no TPU is needed, libtpu is (`pip install 'glmv_jax[tpu]'`).

Numbers of the chips: docs.cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x). Clock = peak / FLOPs a cycle; the FLOPs a
cycle of v6e and tpu7x are inferred from the compiler's estimates, not documented.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from typing import Any

from glmv_jax.typing import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX calls a device; a tpu7x chip is two of them, and its numbers here are halved.

    flops: bfloat16 a second. hbm: bytes. hbm_speed: bytes a second. ici: bytes a second of all links of a device, one
    way; None where it is not published. cycle: FLOPs a cycle. axes: torus dimensions. largest: chips of a pod.
    torus: a dimension that is a multiple of this closes to a ring (with `cubes` only if all of them are).
    """

    flops: float
    hbm: int
    hbm_speed: float
    ici: float | None
    cycle: int
    axes: int
    largest: tuple[int, ...]
    torus: int
    cubes: bool
    per_chip: int = 1

    @property
    def clock(self) -> float:
        """Hz."""
        return self.flops / self.cycle

    @property
    def ici_axis(self) -> float | None:
        """Bytes a second of the links along one torus dimension, one way."""
        return None if self.ici is None else self.ici / self.axes


CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 131_072, 2, (16, 16), 16, False),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 262_144, 3, (16, 20, 28), 4, True),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, 524_288, 2, (16, 16), 16, False),
    "tpu7x": Chip(1153.5e12, 96 * GIB, 3690e9, None, 524_288, 3, (16, 24, 24), 4, True, per_chip=2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several alike that a data-centre network connects. sizes: chips along each torus dimension."""

    family: str
    sizes: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.family]

    @property
    def name(self) -> str:
        return f"{self.family}:{'x'.join(map(str, self.sizes))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which dimensions close to a ring: in whole cubes of 4x4x4 all, in 2-D slices those of 16 chips."""
        closes = tuple(size % self.chip.torus == 0 for size in self.sizes)
        return closes if not self.chip.cubes or all(closes) else (False,) * len(closes)

    @functools.cached_property
    def devices(self) -> list[Any]:
        """The described devices. UserError when libtpu is missing or does not know the topology."""
        described_only()
        from jax.errors import JaxRuntimeError
        from jax.experimental import topologies

        options: dict[str, Any] = {"wrap": [*self.wrap, False, False][:3]}
        if math.prod(self.sizes) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        if self.slices > 1:
            options["num_slices"] = self.slices
        try:
            return list(topologies.get_topology_desc(self.name, "tpu", **options).devices)
        except JaxRuntimeError as error:
            raise UserError(f"topology {self}: libtpu refuses it ({' '.join(str(error).split())[:200]})") from None

    @property
    def devices_per_host(self) -> int:
        return sum(device.process_index == self.devices[0].process_index for device in self.devices)


def parse(name: str, slices: int = 1) -> Topology:
    """A topology by its name, as v5e:4x4 or v5p:8x8x8. UserError names what is wrong and the largest there is."""
    from glmv_jax.config import nearest

    family, _, sizes = name.partition(":")
    if family not in CHIPS:
        close = nearest(family, CHIPS).partition("; known")[0]  # all of them follow in any case
        raise UserError(f"topology {name!r}: no such TPU{close}; known: {', '.join(CHIPS)}")
    chip = CHIPS[family]
    numbers = [int(size) if size.isdecimal() else 0 for size in sizes.split("x")]
    if len(numbers) != chip.axes or min(numbers) < 1:
        example = "x".join(["4"] * chip.axes)
        raise UserError(f"topology {name!r}: {family} has {chip.axes} dimensions; write for example {family}:{example}")
    largest, chips = math.prod(chip.largest), math.prod(numbers)
    if chips > largest or chip.axes == 2 and max(numbers) > max(chip.largest):
        most = f"{family}:{'x'.join(map(str, chip.largest))} ({largest} chips)"
        raise UserError(f"topology {name!r}: the largest pod is {most}; for more, use --slices")
    if slices < 1:
        raise UserError(f"--slices {slices}: there is at least one")
    return Topology(family, tuple(numbers), slices)


def described_only() -> None:
    """Makes this process describe TPUs instead of looking for them; before JAX has started its backends.

    Raises: UserError without libtpu.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs takes libtpu, which runs on any x86 Linux: pip install 'glmv_jax[tpu]'")
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock file stops a second process otherwise
