"""Losses on chosen targets equal those on every position; the rule for MTP depths is the one of losses/mtp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from glmv_jax.losses.cross_entropy import cross_entropy, next_targets
from glmv_jax.losses.mtp import mtp_targets
from glmv_jax.losses.select import behind_image, predictors, select, weights


def rows(seed: int = 0):
    """Two packed rows with images, prompts without weight, and padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 17, (2, 20))
    segments = np.array([[1] * 7 + [2] * 9 + [0] * 4, [1] * 12 + [2] * 8])
    image = np.zeros((2, 20), bool)
    image[0, 8:11] = image[1, 2:6] = True
    weight = rng.choice([0.0, 0.5, 1.0], (2, 20)) * (segments > 0) * ~image
    hidden = rng.normal(size=(2, 20, 6)).astype(np.float32)
    head = rng.normal(size=(6, 17)).astype(np.float32)
    return tokens, segments, image, weight, hidden, head


def test_main_head_equals_all_positions():
    tokens, segments, _, weight, hidden, head = map(jnp.array, rows())
    count = int((weight > 0).sum(1).max())

    def chosen(hidden):
        targets = select(tokens, segments, weight, count)
        h_BJD, w_BJ = predictors(targets, hidden, segments, 1)
        assert targets.cut.shape == ()
        return cross_entropy(h_BJD @ head, targets.tokens_BJ, w_BJ).loss

    def everywhere(hidden):
        targets_BT, weight_BT = next_targets(tokens, weight, segments)
        return cross_entropy(hidden @ head, targets_BT, weight_BT).loss

    np.testing.assert_allclose(chosen(hidden), everywhere(hidden), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(chosen)(hidden), jax.grad(everywhere)(hidden), atol=1e-6)


def test_every_mtp_depth_equals_all_positions():
    tokens, segments, image, weight, hidden, head = map(jnp.array, rows(1))
    targets = select(tokens, segments, weight, 20)
    for depth in (1, 2, 3):
        targets_BT, weight_BT = mtp_targets(tokens, segments, weight, image, depth)
        full = cross_entropy(hidden @ head, targets_BT, weight_BT)
        h_BJD, w_BJ = predictors(targets, hidden, segments, depth + 1)
        np.testing.assert_allclose(cross_entropy(h_BJD @ head, targets.tokens_BJ, w_BJ).loss, full.loss, rtol=1e-6)
        np.testing.assert_allclose(w_BJ.sum(), weight_BT.sum(), rtol=1e-6)


def test_the_last_patch_of_an_image_predicts_the_text_behind_it_and_no_patch_is_predicted():
    """text, image, image, text, text | text: by hand, for the main head and two depths of MTP."""
    tokens, segments = jnp.arange(1, 7)[None], jnp.array([[1, 1, 1, 1, 1, 2]])
    targets = select(tokens, segments, jnp.array([[1.0, 0, 0, 1, 1, 1]]), 6)
    at = np.asarray(targets.at_BJ[0, :4])
    np.testing.assert_array_equal(at, [0, 3, 4, 5])
    for ahead, pairs in ((1, {(2, 3), (3, 4)}), (2, {(1, 3), (2, 4)}), (3, {(0, 3), (1, 4)})):
        weight = np.asarray(weights(targets, segments, ahead))[0]
        assert {(t - ahead, t) for t, w in zip(at, weight) if w} == pairs and not weight[4:].any()


def test_what_does_not_fit_is_told():
    tokens, segments, _, weight, _, _ = map(jnp.array, rows())
    targets = select(tokens, segments, weight, 3)
    assert float(targets.cut) == sum(max(0, int((w > 0).sum()) - 3) for w in np.asarray(weight)) > 0
    assert float(select(tokens, segments, weight, 20).cut) == 0


def test_positions_behind_an_image_of_their_own_segment():
    _, segments, image, *_ = rows()
    found = np.asarray(behind_image(jnp.array(segments), jnp.array(image)))
    expected = np.zeros_like(image)
    for b, t in np.ndindex(*image.shape):
        expected[b, t] = segments[b, t] and image[b, : t + 1][segments[b, : t + 1] == segments[b, t]].any()
    assert expected.any() and (~expected & (segments > 0)).any()
    np.testing.assert_array_equal(found, expected)
