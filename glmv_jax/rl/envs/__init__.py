"""Environments by name, as `play.play` takes them. Each family is a file; a new one is a file and a line here.

task/<task>             a question of `rl.tasks`, in one turn
desk/<task>             the same with tools: crop, search, answer;  desk/lookup: one that needs them
windows                 drawn windows, by clicks and letters
reasoning_gym/<name>    puzzles in words
miniwob/<name>          web pages in a browser
gymnasium/<id>          whatever is registered with Gymnasium
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from glmv_jax.rl import tasks
from glmv_jax.rl.envs import browser, classic, desk, reasoning, single, windows
from glmv_jax.rl.gym import Environment
from glmv_jax.rl.rewards import config
from glmv_jax.typing import UserError


def make(name: str, split: str = "train", seed: int = 0, **options: Any) -> Environment:
    """An environment by name. split, seed: of those that draw their own questions. options: of its class.

    Raises UserError for a family, a member or an option that there is not, and where its package is not installed.
    """
    family, _, member = name.partition("/")
    if family not in FAMILIES:
        raise UserError(f"environment {name!r} is of no family that there is; use {', '.join(FAMILIES)}")
    try:
        inspect.signature(FAMILIES[family]).bind(member, split, seed, **options)
    except TypeError as error:
        raise UserError(f"environment {name!r} of options {', '.join(options) or 'none'}: {error}") from None
    return FAMILIES[family](member, split, seed, **options)


def _task(name: str, split: str, seed: int) -> Environment:
    return single.Single(tasks.get(name).source(split, seed), name)


def _desk(name: str, split: str, seed: int) -> Environment:
    samples = desk.Lookup(split, seed) if name == "lookup" else tasks.get(name).source(split, seed)
    return desk.Desk(samples, f"desk/{name}")


def _gymnasium(name: str, split: str, seed: int, instructions: str = "", actions: tuple[str, ...] = (), **options: Any
               ) -> Environment:  # fmt: skip
    try:
        import gymnasium
    except ImportError:
        raise UserError('gymnasium is not installed; run pip install "glmv_jax[rl]"') from None
    make = functools.partial(gymnasium.make, name, **options)
    try:
        return classic.Classic(make, f"gymnasium/{name}", instructions, actions)
    except gymnasium.error.Error as error:
        raise UserError(f"gymnasium cannot make {name!r}: {error}") from None


FAMILIES: dict[str, Callable[..., Environment]] = {
    "task": _task,
    "desk": _desk,
    "windows": lambda name, split, seed: windows.Windows(split, seed),
    "reasoning_gym": lambda name, split, seed, **options: reasoning.Reasoning(name, **options),
    "miniwob": lambda name, split, seed, pause=0.05, tools=(): browser.Browser(name, pause, tools),
    "gymnasium": _gymnasium,
}


def part(name: str) -> dict[str, Any]:
    """The part of a reward system (`rewards.config`) that grades an environment's episodes as it says: the verifier of
    the question that is asked, or the environment's own verdict. UserError for a question that nothing here grades."""
    family, _, member = name.partition("/")
    if family == "desk" and member == "lookup":
        return {"kind": "rule", "rule": "number"}  # as `desk.lookup_verifier`
    if family in ("task", "desk"):
        return config.of_tasks([member])["sources"][member]["parts"]["task"]
    return {"kind": "environment"}
