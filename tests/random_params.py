"""Parameters for tests in which every part has a say: fresh ones start all residual branches at zero."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from glmv_jax import models


def random_params(cfg: Any, seed: int = 0) -> dict:
    """Fresh parameters of a model config, their residual branches switched on."""
    return jax.tree.map(jnp.asarray, _drawn(cfg, seed))


@functools.lru_cache(maxsize=32)
def _drawn(cfg: Any, seed: int) -> dict:
    """Many tests ask for those of the same few models."""
    return jax.device_get(jax.jit(lambda key: switched_on(models.init_params(cfg, key)))(jax.random.key(seed)))


def switched_on(params: dict) -> dict:
    """The same with the branches' last matrices drawn at random and their norms' gains at one."""

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if name.endswith(("['o']['kernel']", "['down']['kernel']")):
            return jax.random.normal(jax.random.key(zlib.crc32(name.encode())), x.shape, x.dtype) * x.shape[-2] ** -0.5
        return jnp.ones_like(x) if "['post_norm" in name else x

    return jax.tree_util.tree_map_with_path(leaf, params)
