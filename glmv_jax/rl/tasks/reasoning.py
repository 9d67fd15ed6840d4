"""Text reasoning from reasoning-gym (the extra `rl`): those of its data sets whose questions have one right answer.

Its own graders pay for an answer that merely holds the right one; here an answer is right when it equals it, numbers by
value. A question belongs to one split by its hash. Without the extra `riddle` is the task to train on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import choices, other_numbers
from glmv_jax.typing import UserError

# Data set -> the settings that keep its questions short. Without parentheses basic_arithmetic works from left to right
# (0.1.25: "3 + 9 * 10" is 120), so they stay.
DATA_SETS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2, "operators": ("+", "-", "*")},
    "chain_sum": {"max_terms": 4, "max_digits": 2},
    "count_bits": {"max_n": 255},
    "count_primes": {"max_n": 100},
    "gcd": {"max_value": 100},
    "lcm": {"max_value": 30},
    "letter_counting": {"max_words": 8},
    "number_sequence": {"min_terms": 4, "max_terms": 6, "max_complexity": 2},
    "products": {"max_digits": 2},
    "simple_equations": {"max_terms": 3, "max_value": 30},
    "syllogism": {},
}
SUMS = ("basic_arithmetic", "chain_sum", "products")
COUNTS = ("count_bits", "count_primes", "letter_counting", "syllogism")
THEORY = ("gcd", "lcm", "number_sequence", "simple_equations")


def missing() -> str:
    """Why there are no questions here, "" when there are."""
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        return "the task reasoning needs reasoning-gym; pip install 'glmv_jax[rl]', or use riddle"
    return ""


def generate(rng: np.random.Generator, split: str) -> Sample:
    """UserError without the extra."""
    if reason := missing():
        raise UserError(reason)
    import reasoning_gym

    while True:
        data_set = scene.choose(rng, tuple(DATA_SETS))
        seed = int(rng.integers(2**31 - 1))
        entry = reasoning_gym.create_dataset(data_set, seed=seed, size=1, **DATA_SETS[data_set])[0]
        prompt, answer = entry["question"].strip(), str(entry["answer"]).strip()
        if answer and read.belongs(prompt, split):
            break
    meta = {"check": "numeric", "lang": "en", "data_set": data_set}
    if data_set == "syllogism":
        meta["choices"] = ["Yes", "No"]
    return Sample(id="", source="reasoning", images=(), prompt=prompt, answer=answer, meta=meta)


def guesses(sample: Sample) -> list[str]:
    """Near misses, and the right answer with words around it."""
    found = choices(sample) if "choices" in sample.meta else other_numbers(sample) if sample.answer != "0" else []
    return [*found, f"the answer is {sample.answer}", f"{sample.answer} {sample.answer}"]


LEVELS = levels.by_kind("data_set", SUMS, COUNTS, THEORY)
TASKS = (Task("reasoning", boxed(text.number()), guesses, make=generate, missing=missing, levels=LEVELS),)
