"""Rules by name, and how a worker builds the verifier that a configuration names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from glmv_jax.config import nearest
from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.grade import BadGrade, Grade, Verifier, boxed, checked
from glmv_jax.rl.rewards.worker import Spec, attribute
from glmv_jax.typing import UserError

# short name -> (where, whether it is a function of options that returns the rule)
RULES = {
    "exact": ("glmv_jax.rl.rewards.text:exact", False),
    "reading": ("glmv_jax.rl.rewards.text:reading", False),
    "number": ("glmv_jax.rl.rewards.text:number", True),
    "boxes": ("glmv_jax.rl.rewards.geometry:boxes", True),
    "point": ("glmv_jax.rl.rewards.geometry:point", True),
    "maths": ("glmv_jax.rl.rewards.maths:maths", True),
}


def spec(rule: str, args: Mapping[str, Any] | None = None, format_weight: float | None = None) -> Spec:
    """What a worker builds for a rule of a configuration.

    rule: a name of RULES, whose answers are boxed; "tasks/NAME", the verifier of a task; or "module:attribute", a
          verifier `(answer text, sample) -> Grade`, with `args` a function of these that returns one.
    format_weight: of `boxed`, for the first kind (default 0.1).
    Raises UserError for an unknown name.
    """
    if ":" in rule or rule.startswith("tasks/"):
        if format_weight is not None or (args and ":" not in rule):
            raise UserError(f"rule {rule!r} is a verifier of its own: it takes no format_weight, and a task no args")
    elif rule not in RULES:
        hint = nearest(rule, RULES)
        raise UserError(f"no rule {rule!r}{hint}; other forms: tasks/NAME, module:attribute")
    return Spec.of(
        "glmv_jax.rl.rewards.rules:grader", rule=rule, args=None if args is None else _plain(args),
        format_weight=format_weight,
    )  # fmt: skip


def function(path: str, args: Mapping[str, Any] | None = None) -> Spec:
    """Any function "module:attribute" for a worker: a renderer, a comparator; args as in `spec`."""
    if ":" not in path:
        raise UserError(f"{path!r} is not of the form module:attribute")
    return Spec.of("glmv_jax.rl.rewards.rules:made", path=path, args=None if args is None else _plain(args))


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps({name: args[name] for name in args}, default=dict))
    except (TypeError, ValueError) as error:
        raise UserError(f"the arguments of a rule are numbers, text, lists and tables: {error}") from None


# --- in the worker ----------------------------------------------------------------------------------------------------


def made(path: str, args: Mapping[str, Any] | None) -> Callable[..., Any]:
    """The function at `path`, or what it returns for `args`."""
    found = attribute(path)
    return found if args is None else found(**args)


def grader(rule: str, args: Mapping[str, Any] | None, format_weight: float | None) -> Callable[[str, Sample], Any]:
    """A function that returns a Grade, or the flag and the reason when the verifier returned none."""
    verify = verifier(rule, args, format_weight)

    def grade(answer: str, sample: Sample) -> Grade | tuple[str, str]:
        try:
            return checked(verify(answer, sample))
        except BadGrade as error:
            return error.flag, str(error)

    return grade


def verifier(rule: str, args: Mapping[str, Any] | None = None, format_weight: float | None = None) -> Verifier:
    """The verifier that `spec` names."""
    if rule.startswith("tasks/"):
        from glmv_jax.rl import tasks  # which imports the rules of this package

        return tasks.get(rule.removeprefix("tasks/")).verifier
    if ":" in rule:
        return made(rule, args)
    path, takes_options = RULES[rule]
    found = made(path, (args or {}) if takes_options else args)
    return boxed(found) if format_weight is None else boxed(found, format_weight=format_weight)
