"""How two objects of a scene lie: "circle is left of star", "圆形在星形的左边"."""

from __future__ import annotations

import numpy as np

from glmv_jax.data.questions import scene, spatial
from glmv_jax.data.records import Sample

PROMPTS = {"en": ("How do they lie?",), "zh": ("它们的位置关系？",)}
FORMS = {
    "en": {"left": "{} is left of {}", "right": "{} is right of {}", "above": "{} is above {}",
           "below": "{} is below {}"},
    "zh": {side: "{}在{}的" + names["zh"] for side, names in spatial.SIDES.items()},
}  # fmt: skip


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, (a, b), side, canvas = scene.language(rng), *spatial.pair(rng, split)
    text = FORMS[lang][side].format(a.phrase(lang), b.phrase(lang))
    picture = scene.paint(canvas, (a, b), split, rng)
    return scene.description("relate", picture, scene.choose(rng, PROMPTS[lang]), text, lang)
