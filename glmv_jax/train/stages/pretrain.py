"""Stage 3: captions, reading, grounding, charts and plain text in two languages, packed; next-token + MMTP loss."""

from __future__ import annotations

from glmv_jax.train.stages.vlm import VLMStage


class Pretrain(VLMStage):
    name = "pretrain"
    form = "pretrain"
