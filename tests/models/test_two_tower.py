"""Stage 2's model: texts that share a row are embedded as if each had its own."""

from __future__ import annotations

import jax
import numpy as np

from glmv_jax import models, presets
from glmv_jax.models import build, two_tower


def test_texts_side_by_side_embed_as_alone():
    cfg = build.two_tower(presets.two_tower("nano"))
    params = models.init_params(cfg, jax.random.key(0))
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
