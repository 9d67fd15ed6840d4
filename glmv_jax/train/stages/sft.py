"""Stage 4: questions and answers in the chat template, loss on the answer and its stop token, answers in box tokens."""

from __future__ import annotations

from glmv_jax.train.stages.from_files import FromFiles


class SFT(FromFiles):
    name = "sft"
    form = "chat"
