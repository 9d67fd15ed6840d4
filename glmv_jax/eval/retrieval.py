"""Retrieval R@k over many devices, with several captions an image, as CLIP counts it.

A text looks for its image; an image with several captions has found one when any of them is among the first k. The
same numbers as `probes.ranks`, in float32, block by block: 5,000 images and 25,000 captions need no matrix of
125 million scores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glmv_jax.eval import probes, shards

AT = (1, 5, 10)


def both_ways(
    image_NE: np.ndarray, text_ME: np.ndarray, image_of_text_M: np.ndarray, *, at: Sequence[int] = AT,
    mesh: Mesh | None = None,
) -> dict[str, float]:  # fmt: skip
    """{"text -> image R@1": ..., "image -> text R@1": ..., and "mean R@1", of the two}.

    image_of_text_M: for each text the row of its image. Every image has a text.
    """
    image_N = np.arange(len(image_NE))
    to_image = probes.recall(ranks(text_ME, image_NE, image_of_text_M, image_N, mesh=mesh), at)
    to_text = probes.recall(ranks(image_NE, text_ME, image_N, image_of_text_M, mesh=mesh), at)
    found = {f"text -> image {k}": v for k, v in to_image.items()}
    found |= {f"image -> text {k}": v for k, v in to_text.items()}
    return found | {"mean R@1": (to_image["R@1"] + to_text["R@1"]) / 2}


def ranks(
    query_NE: np.ndarray, key_ME: np.ndarray, group_N: np.ndarray, key_group_M: np.ndarray, *,
    mesh: Mesh | None = None, rows: int = 512, block: int = 4096,
) -> np.ndarray:  # fmt: skip
    """[N] how many keys of another group score strictly higher than the best key of the query's own group.

    Args:
      query_NE, key_ME: features, any scale, the same on every host; group_N, key_group_M: integers.
      rows, block: queries and keys of one matrix of scores; queries are split over the data axes of `mesh`.
    Raises: ValueError when a query's group has no key.
    """
    if missing := set(np.unique(group_N).tolist()) - set(np.unique(key_group_M).tolist()):
        raise ValueError(f"{len(missing)} groups of queries have no key, the first is {min(missing)}")
    mesh = shards.one_device() if mesh is None else mesh
    names, index = np.unique(np.concatenate([group_N, key_group_M]), return_inverse=True)
    group, key_group = index[: len(group_N)].astype(np.int32), index[len(group_N) :].astype(np.int32)
    query, group, rows = shards.split_rows(mesh, rows, shards.unit(query_NE), group)
    block = min(block, len(key_ME))
    surplus = -len(key_ME) % block
    key = np.pad(shards.unit(key_ME), ((0, surplus), (0, 0)))
    key_group = np.pad(key_group, (0, surplus), constant_values=-1)  # of no group: never counted
    keys = (shards.whole(mesh, x.reshape(-1, block, *x.shape[1:])) for x in (key, key_group))
    return np.asarray(_ranks(query, group, *keys, mesh=mesh, rows=rows))[: len(query_NE)]


@functools.partial(jax.jit, static_argnames=("mesh", "rows"))
def _ranks(
    query: jax.Array, group: jax.Array, keys_KBE: jax.Array, key_groups_KB: jax.Array, *, mesh: Mesh, rows: int
) -> jax.Array:
    def some(query_RE: jax.Array, group_R: jax.Array, keys_KBE: jax.Array, key_groups_KB: jax.Array) -> jax.Array:
        def best(so_far_R: jax.Array, block: tuple) -> tuple[Any, Any]:
            score_RB, own_RB = shards.scores(query_RE, block[0]), block[1] == group_R[:, None]
            return jnp.maximum(so_far_R, jnp.where(own_RB, score_RB, -jnp.inf).max(1)), None

        def higher(so_far_R: jax.Array, block: tuple) -> tuple[Any, Any]:
            # Own keys are left out by name: two compiled products of the same rows need not agree to the last bit.
            score_RB, other_RB = shards.scores(query_RE, block[0]), block[1] != group_R[:, None]
            counted_RB = (score_RB > best_R[:, None]) & other_RB & (block[1] >= 0)
            return so_far_R + counted_RB.sum(1, dtype=jnp.int32), None

        blocks = (keys_KBE, key_groups_KB)
        best_R, _ = jax.lax.scan(best, jnp.full(len(query_RE), -jnp.inf), blocks)
        return jax.lax.scan(higher, jnp.zeros(len(query_RE), jnp.int32), blocks)[0]

    return shards.map_rows(some, mesh, rows, (query, group), (keys_KBE, key_groups_KB))
