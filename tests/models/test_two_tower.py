"""Stage 2's model: texts that share a row are embedded as if each had its own."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from glmv_jax import models, presets
from glmv_jax.models import build, siglip, two_tower
from tests.random_params import random_params


def test_texts_side_by_side_embed_as_alone():
    cfg = build.two_tower(presets.two_tower("nano"))
    params = random_params(cfg)
    rng = np.random.default_rng(0)
    tokens, segments, alone = (np.zeros(shape, np.int32) for shape in ((4, 24), (4, 24), (4, 2, 24)))
    for row in range(4):
        start = 0
        for n, length in enumerate(rng.integers(1, 11, 2)):
            text = rng.integers(1, 4000, length)
            tokens[row, start:start + length], segments[row, start:start + length] = text, n + 1
            alone[row, n, :length] = text
            start += length
    together = two_tower.embed_texts(cfg, params, tokens, segments, 2)
    assert together.shape == (4, 2, cfg.text_head.out)
    for n in range(2):
        np.testing.assert_allclose(together[:, n], two_tower.embed_text(cfg, params, alone[:, n]), atol=2e-6)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 0.01


def test_rows_longer_than_the_position_table_are_refused():
    """A gather past the end of the table would give nan, and only on some rows."""
    cfg = build.two_tower(presets.two_tower("nano"))
    params = models.abstract_params(cfg)
    rows = np.ones((2, cfg.text.length + 1), np.int32)
    with pytest.raises(ValueError, match="rows of 29 tokens, but the text tower has 28 positions"):
        jax.eval_shape(lambda p: two_tower.embed_text(cfg, p, rows), params)


def test_padding_is_what_follows_the_end_of_a_text():
    """Id 0 inside a text is a token like others, as where a vocabulary has its unknown piece there."""
    cfg = build.two_tower(presets.two_tower("nano"))
    params = random_params(cfg)
    tokens = np.array([[7, 0, 9, 1, 0, 0], [7, 9, 1, 0, 0, 0]], np.int32)
    got = two_tower.embed_text(cfg, params, tokens)
    want = [two_tower.embed_texts(cfg, params, row[None, :n], np.ones((1, n), np.int32), 1)[0, 0]
            for row, n in zip(tokens, (4, 3))]  # fmt: skip
    np.testing.assert_allclose(got, np.stack(want), atol=2e-6)
    assert np.abs(got[0] - got[1]).max() > 0.01


def test_rows_of_a_public_text_tower_are_of_full_length():
    text = siglip.SiglipTextConfig(depth=1, width=8, heads=2, mlp=8, vocab=16, length=6)
    cfg = siglip.SiglipConfig(None, text, siglip.LastConfig(8, 4))
    with pytest.raises(ValueError, match="rows of 8 tokens, but the text tower reads 6 at a time"):
        jax.eval_shape(lambda p: two_tower.embed_texts(cfg, p, np.ones((2, 8), np.int32), None, 1),
                       models.abstract_params(cfg))  # fmt: skip
    assert text.row_length(3) == 18 and text.flops(18) == pytest.approx(3 * text.flops(6))
