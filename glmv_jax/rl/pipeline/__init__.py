"""Asynchronous reinforcement learning: rollouts, rewards, batches and weights at once, none waiting for another."""

from glmv_jax.rl.pipeline.cache import AbortCache
from glmv_jax.rl.pipeline.driver import Pipeline, Taken, train
from glmv_jax.rl.pipeline.group import Group, Member
from glmv_jax.rl.pipeline.protocols import Completion, Drawn, Engine, Prompt, Prompts, Request
from glmv_jax.rl.pipeline.samples import SampleLog, sample_rows
from glmv_jax.rl.pipeline.scheduler import Scheduler
from glmv_jax.rl.pipeline.staleness import Settings
from glmv_jax.rl.pipeline.together import Together
from glmv_jax.rl.pipeline.trace import STAGES, Trace

__all__ = [
    "STAGES",
    "AbortCache",
    "Completion",
    "Drawn",
    "Engine",
    "Group",
    "Member",
    "Pipeline",
    "Prompt",
    "Prompts",
    "Request",
    "SampleLog",
    "Scheduler",
    "Settings",
    "Taken",
    "Together",
    "Trace",
    "sample_rows",
    "train",
]
