"""The accelerators of this machine, shared out to the processes of a sweep; looked up without starting jax."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path

from glmv_jax.typing import UserError


def check(jobs: int, dev: str | Path = "/dev") -> None:
    """Raises UserError when this machine cannot hold that many processes apart."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs} runs nothing; give a number from 1 on")
    if jobs > 1 and has_tpu(dev):
        raise UserError(f"--jobs {jobs}: one process at a time can hold this machine's TPU chips; give --jobs 1")
    if (n := len(gpus(dev))) and jobs % n and n % jobs:
        even = [str(k) for k in range(1, n + 1) if n % k == 0]
        raise UserError(f"--jobs {jobs} does not share {n} GPUs out evenly; give {', '.join(even)}")


def environments(jobs: int, dev: str | Path = "/dev") -> list[dict[str, str]]:
    """For each of `jobs` processes what it has to be told so that it sees its own GPUs alone, all the same number.

    More processes than GPUs share them: what memory each may take, XLA_PYTHON_CLIENT_MEM_FRACTION says.
    """
    found = gpus(dev)
    if jobs == 1 or len(found) < 2:
        return [{}] * jobs
    each = max(1, len(found) // jobs)
    starts = [slot * each % len(found) for slot in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(found[start : start + each])} for start in starts]


def gpus(dev: str | Path = "/dev") -> list[str]:
    """The NVIDIA GPUs that a process would see, by the names that CUDA_VISIBLE_DEVICES has for them."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    numbers = (path.name.removeprefix("nvidia") for path in Path(dev).glob("nvidia[0-9]*"))
    return sorted((n for n in numbers if n.isdecimal()), key=int)


def has_tpu(dev: str | Path = "/dev") -> bool:
    """Whether this machine has TPU chips that jax would take."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms or importlib.util.find_spec("libtpu") is None:
        return False
    return any(itertools.chain(Path(dev).glob("accel[0-9]*"), Path(dev).glob("vfio/[0-9]*")))
