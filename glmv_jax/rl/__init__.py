"""Reinforcement learning with verifiable rewards: tasks, graders, rollouts as records, training rows.

The public names are imported when first used: a process that grades answers imports no jax, and one that trains imports
no grader. `rl.prompts` and `rl.rollout` are modules.
"""

from __future__ import annotations

import importlib
from typing import Any

# public name -> module of this package it lives in
_PUBLIC = {
    "TASKS": "tasks",
    "Grade": "rewards",
    "Rollout": "rollout",
    "Task": "task",
    "by_source": "metrics",
    "image_hash": "integrity",
    "pass_at_k": "metrics",
    "score": "rewards",
    "to_batch": "batch",
    "verifiers": "tasks",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'glmv_jax.rl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"glmv_jax.rl.{_PUBLIC[name]}"), name)
