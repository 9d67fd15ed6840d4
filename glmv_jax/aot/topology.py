"""TPU slices by name, described to the compiler: no TPU is needed, libtpu is (`pip install 'glmv_jax[tpu]'`)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from typing import Any

from glmv_jax.parallel.chips import CHIPS, Chip
from glmv_jax.typing import UserError


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
