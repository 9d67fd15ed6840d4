"""Frozen features put to the test: nearest neighbours and retrieval. NumPy on unit embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def unit(x_NE: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    x = np.asarray(x_NE, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def knn(gallery_NE: np.ndarray, labels_N: np.ndarray, query_ME: np.ndarray, k: int = 5) -> np.ndarray:
    """[M] labels by a vote of the k gallery rows of highest cosine, each voting with exp(cosine / 0.07).

    0.07 is the temperature that DINO's kNN probe uses (arXiv 2104.14294, appendix).
    """
    cosine_MN = unit(query_ME) @ unit(gallery_NE).T
    nearest_Mk = np.argsort(-cosine_MN, axis=1, kind="stable")[:, :k]
    classes, index_N = np.unique(labels_N, return_inverse=True)
    votes = np.zeros((len(query_ME), len(classes)))
    weight_Mk = np.exp(np.take_along_axis(cosine_MN, nearest_Mk, axis=1) / 0.07)
    np.add.at(votes, (np.arange(len(votes))[:, None], index_N[nearest_Mk]), weight_Mk)
    return classes[votes.argmax(1)]


def ranks(
    query_NE: np.ndarray, key_ME: np.ndarray, group_N: np.ndarray, key_group_M: np.ndarray | None = None,
    rows: int = 1024,
) -> np.ndarray:  # fmt: skip
    """[N] how many keys of another group score strictly higher than the best key of the query's own group.

    With images as groups that is retrieval as CLIP counts it: a text looks for its image, and an image with several
    captions has found one when any of them is.

    Args:
      group_N, key_group_M: the groups of queries and of keys; key_group_M is group_N if not given.
      rows: queries at a time, so that N x M scores need not fit into memory.
    Raises: ValueError when a query's group has no key.
    """
    key_group_M = group_N if key_group_M is None else key_group_M
    if missing := set(np.unique(group_N).tolist()) - set(np.unique(key_group_M).tolist()):
        raise ValueError(f"{len(missing)} groups of queries have no key, the first is {min(missing)}")
    key_ME, found = unit(key_ME), []
    for start in range(0, len(query_NE), rows):
        scores_RM = unit(query_NE[start : start + rows]) @ key_ME.T
        own_RM = group_N[start : start + rows, None] == key_group_M[None, :]
        best_R = np.where(own_RM, scores_RM, -np.inf).max(1)
        found.append(((scores_RM > best_R[:, None]) & ~own_RM).sum(1))
    return np.concatenate(found)


def recall(ranks_N: np.ndarray, at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """{"R@1": share of queries whose own key is first, ...}."""
    return {f"R@{k}": float((ranks_N < k).mean()) for k in at}


def chance(group_N: np.ndarray, at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The same for keys in random order: 1 - C(N - own, k) / C(N, k), averaged over queries."""
    n = len(group_N)
    own_N = (group_N[:, None] == group_N[None, :]).sum(1)
    result = {}
    for k in at:
        miss_N = np.ones(n)
        for i in range(min(k, n)):
            miss_N *= np.clip((n - own_N - i) / (n - i), 0.0, 1.0)
        result[f"R@{k}"] = float((1.0 - miss_N).mean())
    return result
