"""Zero-shot measures against scikit-learn and brute force; prompts and class names from files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics as oracle

from glmv_jax.eval import prompts, zeroshot
from glmv_jax.eval.embed import Embedded
from glmv_jax.typing import UserError
from tests.eval.test_knn_and_retrieval import MESHES, clusters, mesh_of


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("sizes", MESHES)
def test_nearest_classes_and_their_measures(sizes):
    rng = np.random.default_rng(0)
    images, labels = clusters(rng, 9, 13, 8, 2.0)
    labels = labels[:-13]  # no picture of the last class, which is still answered
    images = images[:-13]
    classes = rng.normal(size=(9, 8)) + 0.5 * np.stack([images[labels == c].mean(0) for c in range(8)] + [images[0]])
    cosine = images @ classes.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(classes, axis=1)
    top = zeroshot.nearest_classes(images, classes, mesh=mesh_of(sizes), block=10)
    np.testing.assert_array_equal(top, np.argsort(-cosine, axis=1)[:, :5])
    found = zeroshot.accuracies(top, labels)
    assert found["acc1"] == pytest.approx(oracle.accuracy_score(labels, top[:, 0]))
    assert found["acc5"] == pytest.approx(oracle.top_k_accuracy_score(labels, cosine, k=5, labels=range(9)))
    assert 0.05 < found["acc1"] < 0.95
    assert found["mean_per_class_recall"] == pytest.approx(oracle.balanced_accuracy_score(labels, top[:, 0]))
    assert zeroshot.macro_f1(top[:, 0], labels) == pytest.approx(
        oracle.f1_score(labels, top[:, 0], average="macro", labels=np.unique(labels)))  # fmt: skip
    assert "acc5" not in zeroshot.accuracies(zeroshot.nearest_classes(images, classes[:3]), labels % 3)


@pytest.mark.parametrize("sizes", MESHES)
def test_average_precision(sizes):
    rng = np.random.default_rng(1)
    images, classes, truth = rng.normal(size=(70, 6)), rng.normal(size=(5, 6)), rng.random((70, 5)) < 0.2
    truth[:, 3] = False
    cosine = images @ classes.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(classes, axis=1)
    found = zeroshot.average_precisions(images, classes, truth, mesh=mesh_of(sizes))
    assert np.isnan(found[3])
    for c in (0, 1, 2, 4):
        assert found[c] == pytest.approx(oracle.average_precision_score(truth[:, c], cosine[:, c]), abs=1e-6)


def test_worst_group():
    assert zeroshot.worst_group(np.array([1, 1, 0, 1, 0, 0]) > 0, np.array([4, 4, 4, 9, 9, 9])) == pytest.approx(1 / 3)


def test_class_embedding_is_the_unit_mean_of_unit_embeddings():
    lengths = {"cat": 3.0, "a cat": 0.2, "dog": 1.0, "a dog": 5.0}
    direction = {"cat": [1, 0], "a cat": [0, 1], "dog": [1, 0], "a dog": [1, 0]}

    def texts(params, sentences, name):
        features = np.array([np.array(direction[s]) * lengths[s] for s in sentences])
        return Embedded({"embedding": features}, np.arange(len(sentences)), 0, 0.0)

    found = zeroshot.class_embeddings(texts, None, ["cat", "dog"], ["{c}", "a {c}"])
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [1, 0]], atol=1e-6)


def test_prompts_and_names(tmp_path):
    assert len(prompts.CLIP_80) == len(set(prompts.CLIP_80)) == 80
    assert {"a origami {c}.", "itap of my {c}.", "the {c} in a video game.", "a photo of many {c}."} <= set(
        prompts.CLIP_80)  # fmt: skip
    for templates in prompts.SETS.values():
        assert len(set(templates)) == len(templates) and all(t.count("{c}") == 1 for t in templates)
    assert prompts.filled("{c}!", "{odd} name") == "{odd} name!"
    lines, nested, flat = tmp_path / "t.txt", tmp_path / "t.json", tmp_path / "f.json"
    lines.write_text("a {c}\n{} here\n\n")
    nested.write_text(json.dumps({"cars": ["my {c}"], "dtd": []}))
    flat.write_text(json.dumps(["cat", "狗"]))
    assert prompts.templates(str(lines)) == ("a {c}", "{c} here")
    assert prompts.templates(str(nested), "vtab/cars") == ("my {c}",)
    assert prompts.class_names(flat) == ["cat", "狗"]
    lines.write_text("cat\n\ndog\n")
    for wrong, message in [
        (lambda: prompts.class_names(lines), "an empty line or an entry that is no text"),
        (lambda: prompts.class_names(nested, "dtd"), "an empty line or an entry"),
        (lambda: prompts.class_names(nested, "car"), "has nothing for data set 'car'; nearest: cars"),
        (lambda: prompts.templates(str(flat)), "the template 'cat' has no {c}"),
        (lambda: prompts.templates("clip80"), "no set and no file; nearest: clip_80"),
    ]:
        with pytest.raises(UserError, match=message):
            wrong()
