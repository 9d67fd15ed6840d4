"""Answers of a model: the engine, for whoever asks, with drafts of the MTP head or without; one answer from a run; and
the sampler, whose batches answer in lockstep."""

from glmv_jax.inference.batches import EngineSampler
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front
from glmv_jax.inference.generate import Model, generate, generate_from_run, last_stage, question
from glmv_jax.inference.requests import Busy, Completion, Prompt, Request, group
from glmv_jax.inference.sampler import Generated, Prompts, Sampler, Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.inference.text import answer_text

__all__ = [
    "Busy",
    "Completion",
    "Engine",
    "EngineSampler",
    "Front",
    "Generated",
    "Model",
    "Prompt",
    "Prompts",
    "Request",
    "Sampler",
    "Sampling",
    "Settings",
    "answer_text",
    "generate",
    "generate_from_run",
    "group",
    "last_stage",
    "question",
]
