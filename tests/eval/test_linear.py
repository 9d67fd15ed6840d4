"""The linear probe against scikit-learn's logistic regression: the same minimum, the same answers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression as Oracle

from glmv_jax.eval import linear
from glmv_jax.typing import UserError
from tests.eval.test_knn_and_retrieval import MESHES, clusters, mesh_of


def objective(weight_EC, bias_C, x_NE, index_N, strength):
    """scikit-learn's, by row, in float64."""
    logits = x_NE.astype(np.float64) @ weight_EC + bias_C
    logits -= logits.max(1, keepdims=True)
    entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), index_N]
    return (entropy.sum() + strength / 2 * np.square(weight_EC).sum()) / len(x_NE)


@pytest.mark.parametrize("sizes", MESHES)
def test_minimum_is_that_of_scikit_learn(sizes):
    rng = np.random.default_rng(0)
    x, labels = clusters(rng, 7, 45, 12, 1.5)
    order = rng.permutation(len(labels))
    train, asked = order[:231], order[231:]
    regression = linear.LogisticRegression(x[train], labels[train] + 5, mesh=mesh_of(sizes), block=10)
    z = ((x - x[train].mean(0)) / x[train].std(0)).astype(np.float32)
    for strength in (1e-2, 1.0, 100.0):
        found = regression.fit(strength)
        oracle = Oracle(C=1 / strength, tol=1e-8, max_iter=10_000).fit(z[train].astype(np.float64), labels[train])
        least = objective(oracle.coef_.T, oracle.intercept_, z[train], labels[train], strength)
        mine = objective(found.weight, found.bias, z[train], labels[train], strength)
        assert mine == pytest.approx(least, rel=2e-5) and found.loss == pytest.approx(least, rel=2e-5)
        np.testing.assert_allclose(found.weight, oracle.coef_.T, atol=0.01 * np.abs(oracle.coef_).max())
        agree = found.classes[found.scores(x[asked]).argmax(1)] - 5 == oracle.predict(z[asked])
        assert agree.mean() >= 0.98
    assert 0.5 < (oracle.predict(z[asked]) == labels[asked]).mean() < 1.0


def test_rows_that_are_not_used_do_not_count():
    rng = np.random.default_rng(1)
    x, labels = clusters(rng, 3, 40, 6, 1.0)
    used = rng.random(len(x)) < 0.6
    part = linear.LogisticRegression(x, labels, standardise=False).fit(1.0, used)
    alone = linear.LogisticRegression(x[used], labels[used], standardise=False).fit(1.0)
    np.testing.assert_allclose(part.weight, alone.weight, atol=1e-3)
    assert part.loss == pytest.approx(alone.loss, rel=1e-5)


def test_strength_is_chosen_on_held_out_rows():
    rng = np.random.default_rng(2)
    x, labels = clusters(rng, 4, 75, 60, 3.5)  # noise in many channels: without L2 it is learnt by heart
    order = rng.permutation(len(labels))
    train, asked = order[:200], order[200:]
    probe, again = (linear.linear_probe(x[train], labels[train]) for _ in range(2))
    assert probe.strength == max(probe.validation, key=lambda s: (probe.validation[s], s)) == again.strength
    assert len(probe.validation) >= 7 + 4 and {1e-6, 1e6} <= set(probe.validation)
    plain = linear.linear_probe(x[train], labels[train], strength=1e-6)
    right = [(p.classes[p.scores(x[asked]).argmax(1)] == labels[asked]).mean() for p in (probe, plain)]
    assert right[0] > right[1] + 0.03 and plain.validation == {} and plain.loss < 0.01 < probe.loss
    with pytest.raises(UserError, match="needs two classes, these 300 rows have 1"):
        linear.linear_probe(x, 0 * labels)
