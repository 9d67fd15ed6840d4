"""The data of a bar chart: "A=3,B=5,C=1"."""

from __future__ import annotations

import numpy as np

from glmv_jax.data.questions import chart, scene
from glmv_jax.data.records import Sample

PROMPTS = {"en": ("Data?",), "zh": ("数据？",)}


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, canvas = scene.language(rng), scene.choose(rng, chart.CANVASES)
    values = chart.values(rng)
    picture = chart.draw(canvas, values, split, rng)
    answer = ",".join(f"{label}={value}" for label, value in zip(chart.LABELS, values))
    return scene.description("table", picture, scene.choose(rng, PROMPTS[lang]), answer, lang)
