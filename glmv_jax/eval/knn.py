"""Nearest neighbours over many devices: each looks through its part of the gallery, block by block.

The same vote as `probes.knn`, in float32. No matrix of all scores is ever made: a device keeps the k best of each
query while it goes through its part, and the k best of all devices are merged at the end.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from glmv_jax.eval import shards
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.typing import UserError


def knn(
    gallery_NE: np.ndarray, labels_N: np.ndarray, query_ME: np.ndarray, k: int = 20, *, mesh: Mesh | None = None,
    queries: int = 1024, block: int = 8192, temperature: float = 0.07,
) -> np.ndarray:  # fmt: skip
    """[M] labels by a vote of the k gallery rows of highest cosine, each voting with exp(cosine / temperature).

    k = 20 and 0.07 are those of DINO's probe on ImageNet (arXiv 2104.14294, appendix). A tie goes to the label that is
    least; of rows equally near, the first counts.

    Args:
      gallery_NE, query_ME: features, any scale, the same on every host; labels_N: integers.
      queries: at a time. block: gallery rows that a device compares them with at a time.
    Raises: UserError when k is more than the gallery has.
    """
    if not 0 < k <= len(gallery_NE):
        raise UserError(f"k={k} neighbours of a gallery of {len(gallery_NE)}; choose 1 to {len(gallery_NE)}")
    mesh = shards.one_device() if mesh is None else mesh
    classes, index_N = np.unique(labels_N, return_inverse=True)
    real_N = np.ones(len(gallery_NE), bool)
    gallery, real, block = shards.split_rows(mesh, block, shards.unit(gallery_NE), real_N)
    index = shards.whole(mesh, index_N.astype(np.int32))
    queries = min(queries, len(query_ME))
    found = []
    for start in range(0, len(query_ME), queries):
        part = shards.unit(query_ME[start : start + queries])
        full = np.zeros((queries, part.shape[1]), np.float32)
        full[: len(part)] = part
        votes = _votes(
            gallery, real, index, shards.whole(mesh, full), mesh=mesh, k=k, block=block, classes=len(classes),
            temperature=temperature,
        )  # fmt: skip
        found.append(np.asarray(votes)[: len(part)])
    return classes[np.concatenate(found)]


@functools.partial(jax.jit, static_argnames=("mesh", "k", "block", "classes", "temperature"))
def _votes(
    gallery: jax.Array, real: jax.Array, index: jax.Array, query: jax.Array, *, mesh: Mesh, k: int, block: int,
    classes: int, temperature: float,
) -> jax.Array:  # fmt: skip
    """[Q] the class with most votes."""
    axes, rows = mesh_lib.data_axes(mesh), shards.rows_spec(mesh)
    everywhere = PartitionSpec()

    def nearest(gallery_RE: jax.Array, real_R: jax.Array, query_QE: jax.Array) -> tuple:
        """The k best of a device's rows: cosines, and their numbers in the whole gallery."""
        first = jax.lax.axis_index(axes) * len(gallery_RE) if axes else 0

        def look(best: tuple, n: jax.Array) -> tuple[Any, Any]:
            rows_bE = jax.lax.dynamic_slice_in_dim(gallery_RE, n * block, block)
            real_b = jax.lax.dynamic_slice_in_dim(real_R, n * block, block)
            cosine_Qb = jnp.where(real_b, shards.scores(query_QE, rows_bE), -jnp.inf)
            number_Qb = jnp.broadcast_to(first + n * block + jnp.arange(block), cosine_Qb.shape)
            return _best(k, jnp.concatenate([best[0], cosine_Qb], 1), jnp.concatenate([best[1], number_Qb], 1)), None

        none = (jnp.full((len(query_QE), k), -jnp.inf), jnp.zeros((len(query_QE), k), jnp.int32))
        best, _ = jax.lax.scan(look, none, jnp.arange(len(gallery_RE) // block))
        return tuple(x[None] for x in best)

    parts = jax.shard_map(
        nearest, mesh=mesh, in_specs=(rows, rows, everywhere), out_specs=(rows, rows), check_vma=False
    )(gallery, real, query)
    # [parts, Q, k] -> [Q, parts * k]: the parts are in the order of the gallery, so that ties are, too.
    cosine_Qk, number_Qk = _best(k, *(jnp.moveaxis(x, 0, 1).reshape(len(query), -1) for x in parts))
    # Shifted by the best one, which changes no comparison and cannot overflow.
    weight_Qk = jnp.exp((cosine_Qk - cosine_Qk[:, :1]) / temperature)
    votes_QC = jnp.zeros((len(query), classes)).at[jnp.arange(len(query))[:, None], index[number_Qk]].add(weight_Qk)
    return votes_QC.argmax(1)


def _best(k: int, cosine: jax.Array, number: jax.Array) -> tuple:
    cosine, place = jax.lax.top_k(cosine, k)
    return cosine, jnp.take_along_axis(number, place, axis=1)
