"""Sampling from a model: the cached sampler, and one answer from a trained run."""

from glmv_jax.inference.generate import Model, generate, generate_from_run, last_stage, question
from glmv_jax.inference.sampler import Generated, Prompts, Sampler, Sampling
from glmv_jax.inference.text import answer_text

__all__ = [
    "Generated",
    "Model",
    "Prompts",
    "Sampler",
    "Sampling",
    "answer_text",
    "generate",
    "generate_from_run",
    "last_stage",
    "question",
]
