"""Zero-shot classification: pictures are of the class whose name, put into sentences, is nearest.

CLIP's protocol (arXiv 2103.00020, section 3.1.4): a class is the mean of the unit embeddings of its name in every
template, made unit again. Measures are those of CLIP benchmark and DataComp.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glmv_jax.eval import shards
from glmv_jax.eval.embed import Embedder
from glmv_jax.eval.prompts import filled
from glmv_jax.typing import Params


def class_embeddings(texts: Embedder, params: Params, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """[C, E] unit, of the C names in the T templates."""
    sentences = [filled(template, name) for name in names for template in templates]
    embedded = texts(params, sentences, "class names").features["embedding"]
    return shards.unit(shards.unit(embedded).reshape(len(names), len(templates), -1).mean(1, dtype=np.float64))


def nearest_classes(
    image_NE: np.ndarray, class_CE: np.ndarray, k: int = 5, *, mesh: Mesh | None = None, block: int = 1024
) -> np.ndarray:
    """[N, min(k, C)] the classes of highest cosine, best first."""
    mesh = shards.one_device() if mesh is None else mesh
    image, block = shards.split_rows(mesh, block, shards.unit(image_NE))
    classes = shards.whole(mesh, shards.unit(class_CE))
    return np.asarray(_nearest(image, classes, mesh=mesh, block=block, k=min(k, len(class_CE))))[: len(image_NE)]


@functools.partial(jax.jit, static_argnames=("mesh", "block", "k"))
def _nearest(image: jax.Array, classes: jax.Array, *, mesh: Mesh, block: int, k: int) -> jax.Array:
    best = lambda image_bE, class_CE: jax.lax.top_k(shards.scores(image_bE, class_CE), k)[1]  # noqa: E731
    return shards.map_rows(best, mesh, block, (image,), (classes,))


def average_precisions(
    image_NE: np.ndarray, class_CE: np.ndarray, truth_NC: np.ndarray, *, mesh: Mesh | None = None
) -> np.ndarray:
    """[C] average precision: the mean, over the pictures that have a class, of the precision down to them.

    As CLIP benchmark's `mean_average_precision`; nan for a class that no picture has. Pictures of equal score keep
    their order.
    """
    mesh = shards.one_device() if mesh is None else mesh
    # Classes are split over devices, as every one sorts all pictures.
    classes, truth, block = shards.split_rows(mesh, 16, shards.unit(class_CE), np.asarray(truth_NC, bool).T)
    image = shards.whole(mesh, shards.unit(image_NE))
    found = _precisions(classes, truth, image, mesh=mesh, block=block)
    return np.asarray(found)[: len(class_CE)]


@functools.partial(jax.jit, static_argnames=("mesh", "block"))
def _precisions(classes: jax.Array, truth: jax.Array, image: jax.Array, *, mesh: Mesh, block: int) -> jax.Array:
    def some(class_bE: jax.Array, truth_bN: jax.Array, image_NE: jax.Array) -> jax.Array:
        order_bN = jnp.argsort(-shards.scores(class_bE, image_NE), axis=1, stable=True)
        hit_bN = jnp.take_along_axis(truth_bN, order_bN, axis=1).astype(jnp.float32)
        precision_bN = jnp.cumsum(hit_bN, axis=1) / jnp.arange(1, hit_bN.shape[1] + 1)
        return (precision_bN * hit_bN).sum(1) / hit_bN.sum(1)

    return shards.map_rows(some, mesh, block, (classes, truth), (image,))


# --- measures: NumPy on numbers of classes ----------------------------------------------------------------------------


def accuracies(top_Nk: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """acc1, acc5 (where there are five classes) and mean_per_class_recall (over the classes that pictures have)."""
    hit_Nk = top_Nk == label_N[:, None]
    found = {"acc1": float(hit_Nk[:, 0].mean())}
    if top_Nk.shape[1] >= 5:
        found["acc5"] = float(hit_Nk[:, :5].any(1).mean())
    recalls = [hit_Nk[label_N == label, 0].mean() for label in np.unique(label_N)]
    return found | {"mean_per_class_recall": float(np.mean(recalls))}


def macro_f1(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """The mean of 2 * hits / (pictures of it + answers of it) over the classes that pictures have, as in WILDS."""
    scores = []
    for label in np.unique(label_N):
        true, said = label_N == label, predicted_N == label
        scores.append(2 * (true & said).sum() / (true.sum() + said.sum()))
    return float(np.mean(scores))


def worst_group(hit_N: np.ndarray, group_N: np.ndarray) -> float:
    """The least share of hits among the groups that have pictures."""
    return float(min(hit_N[group_N == group].mean() for group in np.unique(group_N)))
