"""What all parts of the policy loss use: precision, ratios, and names from a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from glmv_jax.config import nearest
from glmv_jax.typing import UserError

LOG_LIMIT = 20.0  # beyond e^20 a ratio only overflows
T = TypeVar("T")


def floating(x: Any) -> jax.Array:
    """x in float32, or in float64 where it is that."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_ratio(logprob_BT: jax.Array, old_logprob_BT: jax.Array) -> jax.Array:
    """log(pi / pi_old), clamped to +-20; the old policy gets no gradient."""
    gap_BT = floating(logprob_BT) - jax.lax.stop_gradient(floating(old_logprob_BT))
    return jnp.clip(gap_BT, -LOG_LIMIT, LOG_LIMIT)


def choice(where: str, value: str, known: Iterable[str]) -> None:
    """UserError, which names the nearest, unless the value at `where` of the config is one of `known`."""
    if value not in (known := tuple(known)):
        raise UserError(f"{where}={value!r} is not known{nearest(value, known)}; choose one of {', '.join(known)}")


def settings(cls: type[T], given: Mapping[str, Any], where: str = "loss") -> T:
    """The dataclass `cls` with the values of a group of the config in place of its defaults, groups inside included.

    Raises: UserError for a name that it does not have, which names the nearest.
    """
    default: Any = cls()
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    for name in given:
        if name not in fields:
            raise UserError(f"{where}.{name} is not known{nearest(name, fields)}")
    inside = lambda name, value: (  # noqa: E731
        settings(type(fields[name]), value, f"{where}.{name}") if dataclasses.is_dataclass(fields[name]) else value
    )
    return cls(**{name: inside(name, value) for name, value in given.items()})
