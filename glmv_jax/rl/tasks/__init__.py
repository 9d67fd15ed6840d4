"""All tasks by name. A new family of tasks is a file with a `TASKS` tuple and a word here.

    TASKS = (Task("spiral", boxed(text.exact), hacks, make=generate),)     # generate(rng, split) -> Sample

A generator draws everything from its `rng`, so that sample i is the same on every machine; `scene.sample(name, picture,
prompt, answer, lang, check, **facts)` makes what it returns. Its docstring says at what size the picture is legible.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from glmv_jax.data.questions import KINDS, Questions
from glmv_jax.rl.rewards.grade import Verifier
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import (
    agentic,
    arithmetic,
    box3d,
    captioning,
    difference,
    document,
    formula,
    geometry,
    hallucination,
    instruction,
    line,
    puzzle,
    reasoning,
    refer,
    riddle,
    search,
    tabular,
    visual,
)
from glmv_jax.typing import UserError

FAMILIES = (
    visual, line, document, tabular, formula, refer, geometry, arithmetic, puzzle, riddle, reasoning, box3d, difference,
    hallucination, instruction, search, captioning, agentic,
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}


def get(name: str) -> Task:
    """A task by name; UserError naming the nearest one."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.0)[0]
        raise UserError(f"task {name!r} does not exist; nearest: {near}; known: {', '.join(TASKS)}")
    return TASKS[name]


def source(name: str, split: str, seed: int = 0) -> Any:
    """Endless random access to the samples of a task, or of a kind of question that is none (a description).

    UserError naming the nearest task for any other name.
    """
    return Questions([name], split, seed) if name in KINDS else get(name).source(split, seed)


def verifiers(names: Iterable[str] | None = None) -> dict[str, Verifier]:
    """The verifiers of some tasks by data source, as `rewards.score` takes them; None: of all that can grade here.

    UserError when a named one cannot: this machine lacks something, or a model grades it, which takes the reward system
    and a judge. Every answer would be an error.
    """
    chosen = {name: get(name) for name in names} if names is not None else TASKS
    lacking = {name: reason for name, task in chosen.items() if (reason := task.missing() or _judged(task))}
    if lacking and names is not None:
        raise UserError(next(iter(lacking.values())))
    return {name: task.verifier for name, task in chosen.items() if name not in lacking}


def _judged(task: Task) -> str:
    if not task.rubric:
        return ""
    return f"task {task.name} is graded by a model and no judge is set; give the reward system one, or leave it out"
