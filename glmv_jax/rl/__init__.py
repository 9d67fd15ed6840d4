"""Reinforcement learning with verifiable rewards: tasks, graders, rollouts as records, training rows."""

from glmv_jax.rl.batch import to_batch
from glmv_jax.rl.metrics import by_source, pass_at_k
from glmv_jax.rl.prompts import prompts
from glmv_jax.rl.rewards import Grade, score
from glmv_jax.rl.rollout import Rollout, image_hash, rollout
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import TASKS, verifiers

__all__ = [
    "TASKS",
    "Grade",
    "Rollout",
    "Task",
    "by_source",
    "image_hash",
    "pass_at_k",
    "prompts",
    "rollout",
    "score",
    "to_batch",
    "verifiers",
]
