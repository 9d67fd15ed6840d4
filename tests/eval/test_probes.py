"""Probes against brute force and scikit-learn-free simulation."""

from __future__ import annotations

import numpy as np
import pytest

from glmv_jax.eval import probes


def test_retrieval_with_several_captions_an_image():
    """By brute force, as CLIP counts: a text finds its image; an image finds any of its texts."""
    rng = np.random.default_rng(0)
    image_of_text = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    images, texts = rng.normal(size=(40, 6)), rng.normal(size=(len(image_of_text), 6))
    texts += 0.7 * images[image_of_text]
    cosine = np.array([[t @ i / np.linalg.norm(t) / np.linalg.norm(i) for i in images] for t in texts])
    for k in (1, 5, 10):
        to_image = np.mean([image_of_text[n] in np.argsort(-row)[:k] for n, row in enumerate(cosine)])
        to_text = np.mean([n in image_of_text[np.argsort(-cosine[:, n])[:k]] for n in range(40)])
        found = probes.ranks(texts, images, image_of_text, np.arange(40), rows=7)
        back = probes.ranks(images, texts, np.arange(40), image_of_text, rows=7)
        assert probes.recall(found, (k,)) == {f"R@{k}": to_image} and probes.recall(back, (k,)) == {f"R@{k}": to_text}
    with pytest.raises(ValueError, match="1 groups of queries have no key, the first is 40"):
        probes.ranks(images, texts, np.arange(1, 41), image_of_text)


def test_knn_on_separated_clusters_and_by_hand():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    gallery = np.repeat(centres, 5, 0) + 0.05 * rng.normal(size=(20, 8))
    labels = np.repeat([7, 3, 9, 1], 5)
    queries = centres + 0.05 * rng.normal(size=centres.shape)
    np.testing.assert_array_equal(probes.knn(gallery, labels, queries), [7, 3, 9, 1])
    # Two far votes for 1 do not outweigh one near vote for 0.
    gallery = np.array([[1.0, 0.02], [0.7, 0.7], [0.7, 0.71]])
    assert probes.knn(gallery, np.array([0, 1, 1]), np.array([[1.0, 0.0]]), k=3)[0] == 0


def test_ranks_by_brute_force():
    rng = np.random.default_rng(1)
    query, key, group = rng.normal(size=(30, 6)), rng.normal(size=(30, 6)), rng.integers(0, 12, 30)
    expected = []
    for i in range(30):
        cos = [query[i] @ key[j] / np.linalg.norm(query[i]) / np.linalg.norm(key[j]) for j in range(30)]
        order = sorted(range(30), key=lambda j: -cos[j])
        expected.append(next(r for r, j in enumerate(order) if group[j] == group[i]))
    np.testing.assert_array_equal(probes.ranks(query, key, group), expected)
    assert probes.recall(np.array([0, 1, 4, 5]), (1, 5)) == {"R@1": 0.25, "R@5": 0.75}


def test_chance_by_simulation():
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(20), [1, 2] * 10)
    seen = [probes.recall(probes.ranks(rng.normal(size=(30, 4)), rng.normal(size=(30, 4)), group)) for _ in range(400)]
    expected = probes.chance(group)
    for at in ("R@1", "R@5"):
        assert abs(np.mean([s[at] for s in seen]) - expected[at]) < 0.01
    assert np.isclose(probes.chance(np.arange(180))["R@5"], 5 / 180)
    with np.errstate(all="raise"):
        assert probes.chance(np.arange(3)) == {"R@1": pytest.approx(1 / 3), "R@5": 1.0}  # fewer than five in all
