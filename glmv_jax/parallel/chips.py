"""Numbers of chips: what a compiler's report, a training log and a plan measure themselves against.

TPUs: docs.cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x). Clock = peak / FLOPs a cycle; the FLOPs a cycle of v6e and
tpu7x are inferred from the compiler's estimates, not documented. GPUs: NVIDIA's data sheets, dense bfloat16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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

# JAX's `device_kind` begins with -> bfloat16 FLOPs a second of what it calls a device; the first that fits.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(devices: Any) -> float:
    """bfloat16 FLOPs a second of all these `jax.Device`s together; 0.0 where that of one is not known, as of a CPU."""
    of = lambda kind: next((flops for name, flops in PEAKS.items() if kind.startswith(name)), 0.0)  # noqa: E731
    found = [of(device.device_kind) for device in devices]
    return sum(found) if all(found) else 0.0
