"""All tasks by name. A new family of tasks is a file with a `TASKS` tuple and a word here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from glmv_jax.rl.rewards.grade import Verifier
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import visual
from glmv_jax.typing import UserError

TASKS: dict[str, Task] = {task.name: task for task in (*visual.TASKS,)}


def get(name: str) -> Task:
    """A task by name; UserError naming the nearest one."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.0)[0]
        raise UserError(f"task {name!r} does not exist; nearest: {near}; known: {', '.join(TASKS)}")
    return TASKS[name]


def verifiers(names: Iterable[str] = TASKS) -> dict[str, Verifier]:
    """The verifiers of some tasks by data source, as `rewards.score` takes them."""
    return {name: get(name).verifier for name in names}
