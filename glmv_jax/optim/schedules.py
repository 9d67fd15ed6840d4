"""Learning-rate schedules: a linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy

from glmv_jax.config import nearest
from glmv_jax.typing import UserError

DECAYS = ("cosine", "linear", "constant")
_KEYS = ("warmup", "decay", "final")


def schedule(cfg: Mapping[str, Any], peak: float, total_steps: int) -> Callable[[Any], Any]:
    """A function from the number of updates already made (0, 1, ...) to the learning rate of the next one.

    With w = warm-up steps and n = total_steps:
        t <  w:  peak * (t + 1) / (w + 1)              the first update is small, never zero
        t >= w:  u = min(1, (t - w) / (n - w)), and
                 cosine    peak * (final + (1 - final) * (1 + cos(pi * u)) / 2)
                 linear    peak * (final + (1 - final) * (1 - u))
                 constant  peak

    Args:
      cfg: warmup: updates (an int) or the fraction of total_steps (a float below 1), default 0;
        decay: "cosine" | "linear" | "constant", default "cosine"; final: the fraction of `peak` that is left at
        total_steps, default 0.
      peak: the learning rate at the end of warm-up.
      total_steps: updates in the run.

    Raises: UserError for an unknown key or decay, and for a warm-up that does not fit in the run.
    """
    for key in cfg.keys():
        if key not in _KEYS:
            raise UserError(f"optim.schedule: unknown key {key!r}{nearest(key, _KEYS)}")
    decay, final, warmup = cfg.get("decay", "cosine"), float(cfg.get("final", 0.0)), cfg.get("warmup", 0)
    if decay not in DECAYS:
        raise UserError(f"optim.schedule.decay={decay!r} is not one of {', '.join(DECAYS)}")
    if isinstance(warmup, float) and not 0 <= warmup < 1:
        raise UserError(f"optim.schedule.warmup={warmup} is neither a number of steps nor a fraction below 1")
    warmup_steps = math.ceil(warmup * total_steps) if isinstance(warmup, float) else int(warmup)
    if not 0 <= warmup_steps <= total_steps:
        raise UserError(f"optim.schedule.warmup={warmup_steps} does not fit in {total_steps} steps; make it smaller")

    def value(count: Any) -> Any:
        np = jax.numpy if isinstance(count, jax.Array) else numpy  # logging asks on the host, with plain numbers
        ramp = (count + 1) / (warmup_steps + 1)
        u = np.clip((count - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
        if decay == "cosine":
            shape = final + (1 - final) * 0.5 * (1 + np.cos(np.pi * u))
        elif decay == "linear":
            shape = final + (1 - final) * (1 - u)
        else:
            shape = np.ones_like(u)
        return peak * np.where(count < warmup_steps, ramp, shape)

    return value
