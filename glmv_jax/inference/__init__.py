"""Sampling from a model: the cached sampler, with drafts of the MTP head or without, and one answer from a run."""

from glmv_jax.inference.generate import Model, generate, generate_from_run, last_stage, question
from glmv_jax.inference.sampler import Generated, Prompts, Sampler, Sampling
from glmv_jax.inference.speculative import Speculated, SpeculativeSampler
from glmv_jax.inference.text import answer_text

__all__ = [
    "Generated",
    "Model",
    "Prompts",
    "Sampler",
    "Sampling",
    "Speculated",
    "SpeculativeSampler",
    "answer_text",
    "generate",
    "generate_from_run",
    "last_stage",
    "question",
]
