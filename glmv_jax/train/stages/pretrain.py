"""Stage 3: captions, reading, grounding, charts and plain text in two languages, packed; next-token + MMTP loss."""

from __future__ import annotations

from glmv_jax.train.stages.from_files import FromFiles


class Pretrain(FromFiles):
    name = "pretrain"
    form = "pretrain"
