"""The evaluators over many devices against scikit-learn and brute-force NumPy, on random features."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from glmv_jax.eval import probes, retrieval
from glmv_jax.eval.knn import knn
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.typing import UserError

MESHES = [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 4}]


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values())))
    if jax.device_count() < count:
        pytest.skip("needs 8 (emulated) devices")
    return make_mesh(sizes, jax.devices()[:count])


def clusters(rng, classes, each, width, noise):
    """Features that are far from separable, and their classes."""
    labels = np.repeat(np.arange(classes), each)
    return rng.normal(size=(classes, width))[labels] + noise * rng.normal(size=(len(labels), width)), labels


@pytest.mark.parametrize("sizes", MESHES)
def test_knn_is_that_of_scikit_learn(sizes):
    rng = np.random.default_rng(0)
    features, labels = clusters(rng, 12, 50, 16, 1.6)
    order = rng.permutation(len(labels))
    gallery, asked = order[:450], order[450:]
    votes = dict(metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    for k in (1, 7, 20):
        oracle = KNeighborsClassifier(k, **votes).fit(features[gallery], labels[gallery] * 3 + 1)
        expected = oracle.predict(features[asked])
        found = knn(features[gallery], labels[gallery] * 3 + 1, features[asked], k, mesh=mesh_of(sizes), queries=64,
                    block=23)  # fmt: skip
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found, probes.knn(features[gallery], labels[gallery] * 3 + 1, features[asked], k))
    assert 0.3 < (found == labels[asked] * 3 + 1).mean() < 0.98  # neither hopeless nor trivial


def test_knn_of_few_rows_and_of_too_many_neighbours():
    gallery, labels = np.eye(3), np.array([5, 6, 7])
    np.testing.assert_array_equal(knn(gallery, labels, gallery * 9, 1, mesh=mesh_of({"data": 8})), labels)
    # All three are neighbours of each, and the nearest outweighs the two others.
    np.testing.assert_array_equal(knn(gallery, labels, gallery, 3, mesh=mesh_of({"data": 8})), labels)
    # All are on the other side of these: nothing that only fills a shard up may come before them.
    away = np.array([[-0.1, -0.2, -0.3], [-0.3, -0.1, -0.2]])
    np.testing.assert_array_equal(knn(gallery, labels, away, 1, mesh=mesh_of({"data": 8})), [5, 6])
    with pytest.raises(UserError, match="k=4 neighbours of a gallery of 3; choose 1 to 3"):
        knn(gallery, labels, gallery, 4)


@pytest.mark.parametrize("sizes", MESHES)
def test_ranks_are_those_of_brute_force(sizes):
    rng = np.random.default_rng(1)
    image_of_text = np.repeat(np.arange(83), rng.integers(1, 6, 83))
    rng.shuffle(image_of_text)
    images = rng.normal(size=(83, 12)).astype(np.float32)
    texts = (rng.normal(size=(len(image_of_text), 12)) + 0.7 * images[image_of_text]).astype(np.float32)
    arguments = [(texts, images, image_of_text, np.arange(83)), (images, texts, np.arange(83), image_of_text)]
    for query, key, group, key_group in arguments:
        found = retrieval.ranks(query, key, group, key_group, mesh=mesh_of(sizes), rows=9, block=20)
        np.testing.assert_array_equal(found, probes.ranks(query, key, group, key_group))
    both = retrieval.both_ways(images, texts, image_of_text, mesh=mesh_of(sizes))
    cosine = np.array([[t @ i / np.linalg.norm(t) / np.linalg.norm(i) for i in images] for t in texts])
    for k in (1, 5, 10):
        to_image = np.mean([image_of_text[n] in np.argsort(-row)[:k] for n, row in enumerate(cosine)])
        to_text = np.mean([n in image_of_text[np.argsort(-cosine[:, n])[:k]] for n in range(83)])
        assert both[f"text -> image R@{k}"] == to_image and both[f"image -> text R@{k}"] == to_text
    assert both["mean R@1"] == (both["text -> image R@1"] + both["image -> text R@1"]) / 2
    with pytest.raises(ValueError, match="1 groups of queries have no key, the first is 83"):
        retrieval.ranks(images, texts, np.arange(1, 84), image_of_text)
