"""Reward systems as configurations: plain tables, read strictly, a mistyped key answered by the nearest one.

    rewards = {
        "workers": 4, "memory_gb": 4.0,
        "judges": {"large": {"url": "http://judge:8000/v1", "model": "glm-4.5v", "connections": 64}},
        "sources": {
            "count": {"parts": {"rule": {"kind": "rule", "rule": "number"}}},
            "chart": {  # exact first, a judge only where that fails, and nothing for mixed languages
                "parts": {
                    "style": {"kind": "style"},
                    "exact": {"kind": "rule", "rule": "number", "args": {"relative": 0.05}},
                    "judge": {"kind": "judge", "judge": "large", "rubric": "Units may be left out."},
                },
                "gate": ("style",), "how": "first", "order": ("exact", "judge"),
            },
            "ui2code": {
                "parts": {},
                "group": {"render": "package.module:render", "comparator": {"kind": "judge", "judge": "large"}},
            },
            "miniwob": {"parts": {"done": {"kind": "environment"}}},
        },
    }

The order of keys means nothing (configurations are kept sorted): `gate` and `order` say it where it matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glmv_jax.config import nearest
from glmv_jax.rl.rewards.combine import Combination
from glmv_jax.rl.rewards.judge import Endpoint, Judging
from glmv_jax.rl.rewards.rvpo import FORMS
from glmv_jax.typing import UserError

LONGEST_UNBOXED = 1000  # characters of an answer to a task that a model grades, which asks for a sentence
DEFAULTS = {"workers": 2, "memory_gb": 4.0, "limit": 2.0, "judges": {}, "sources": {}}
SOURCE = {"parts": {}, "gate": (), "how": "sum", "order": (), "weights": {}, "lowest": 0.0, "group": None}
GROUP = {"comparator": None, "render": None, "render_args": None, "form": "algorithm1", "polish": False, "limit": None}
_JUDGING = {field.name: field.default for field in dataclasses.fields(Judging)}
PARTS: dict[str, dict[str, Any]] = {
    # args: of a rule that is made by a function; limit: seconds a call, None: that of the system; images: whether the
    # rule is given the pictures of the sample, which cost time on the way to it.
    "rule": {"rule": None, "args": None, "format_weight": None, "limit": None, "images": False},
    "judge": {"judge": None, **_JUDGING},
    "environment": {"low": 0.0, "high": 1.0, "passes": 1.0},  # rewards from low to high become 0 to 1
    "style": {"mixed": 0.05, "latin": 0.5, "repetition": 0.3, "span": 8, "box": None},
}
COMPARATORS: dict[str, dict[str, Any]] = {
    "rule": {"rule": None, "args": None, "limit": None}, "judge": {"judge": None, **_JUDGING},
}  # fmt: skip


def _table(what: str, given: Any) -> Mapping[str, Any]:
    if not hasattr(given, "keys"):
        raise UserError(f"{what}: {type(given).__name__} is not a table of keys")
    return given


def filled(what: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with what is given; UserError for a key that is none of them, or for a missing one.

    A default of None in a table of parts means that "judge", "rule" or "comparator" has to be given.
    """
    for key in _table(what, given).keys():
        if key not in defaults:
            raise UserError(f"{what}: no key {key!r}{nearest(key, defaults)}")
    table = {**defaults, **{key: given[key] for key in given.keys()}}
    for key in ("judge", "rule", "comparator"):
        if key in defaults and table[key] is None:
            raise UserError(f"{what}: {key!r} has to be given")
    return table


def part(what: str, given: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """(kind, its options) of one part or comparator."""
    kind = _table(what, given).get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{what}: no kind {kind!r}{nearest(str(kind), kinds)}")
    return kind, filled(what, {key: given[key] for key in given.keys() if key != "kind"}, kinds[kind])


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """parts: name -> (kind, options); group: (the options of GROUP, its comparator's kind and options), or None."""

    parts: dict[str, tuple[str, dict[str, Any]]]
    combination: Combination
    group: tuple[dict[str, Any], str, dict[str, Any]] | Any


def source(name: str, given: Mapping[str, Any], judges: Iterable[str]) -> SourceConfig:
    """What the configuration says about one data source."""
    what = f"rewards of {name}"
    table = filled(what, given, SOURCE)
    given = _table(f"{what}, parts", table["parts"])
    parts = {key: part(f"{what}, part {key}", given[key], PARTS) for key in given.keys()}
    weights = _table(f"{what}, weights", table["weights"])
    combination = Combination(
        table["how"], tuple(table["gate"]), tuple(table["order"]),
        tuple((key, float(weights[key])) for key in weights.keys()), float(table["lowest"]),
        frozenset(key for key, (kind, _) in parts.items() if kind == "style"),
    )  # fmt: skip
    combination.check(name, tuple(parts))
    group = None
    if table["group"] is not None:
        options = filled(f"{what}, group", table["group"], GROUP)
        if options["form"] not in FORMS:
            raise UserError(f"{what}: no form {options['form']!r} of RVPO{nearest(options['form'], FORMS)}")
        group = (options, *part(f"{what}, comparator", options["comparator"], COMPARATORS))
    elif not parts:
        raise UserError(f"{what}: it has neither parts nor a group")
    for key, (kind, options) in (parts | ({"comparator": group[1:]} if group else {})).items():
        if kind == "environment" and not options["low"] < options["high"]:
            raise UserError(f"{what}, {key}: low={options['low']} is not below high={options['high']}")
        if kind == "judge" and options["judge"] not in judges:
            raise UserError(f"{what}, {key}: no judge {options['judge']!r}{nearest(options['judge'], judges)}")
    return SourceConfig(parts, combination, group)


def judges(given: Mapping[str, Any]) -> dict[str, Endpoint]:
    """The endpoints by name."""
    fields = {field.name: field.default for field in dataclasses.fields(Endpoint)}
    found = {}
    for name in given.keys():
        table = filled(f"judge {name}", given[name], fields)
        if not all(isinstance(table[key], str) and table[key] for key in ("url", "model")):
            raise UserError(f"judge {name}: it needs a url and a model")
        found[name] = Endpoint(**table)
    return found


def read(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Endpoint], dict[str, SourceConfig]]:
    """The table of a whole system with its defaults, its judges and its sources; UserError for what makes no sense."""
    table = filled("rewards", given, DEFAULTS)
    endpoints = judges(table["judges"])
    sources = _table("rewards, sources", table["sources"])
    return table, endpoints, {name: source(name, sources[name], endpoints) for name in sources.keys()}


def of_run(
    given: Mapping[str, Any], names: Sequence[str], episodes: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """`given` for a run that trains on the tasks of these names: those that it says nothing of are graded as they say.

    episodes: the parts that grade those of environments, by data source.
    UserError for a source that the run has not, and as `of_tasks`.
    """
    table = {key: given[key] for key in _table("rewards", given).keys()}
    sources, episodes = _table("rewards, sources", table.get("sources", {})), episodes or {}
    known = [*names, *episodes]
    for name in sources.keys():
        if name not in known:
            raise UserError(f"rewards.sources.{name}: the run has no such data source{nearest(name, known)}")
    own = {name: {"parts": {"episode": part}} for name, part in episodes.items()}
    own |= of_tasks(name for name in names if name not in sources.keys())["sources"]
    return table | {"sources": own | {name: sources[name] for name in sources.keys()}}


def of_tasks(names: Iterable[str], judge: str = "", **options: Any) -> dict[str, Any]:
    """A configuration in which every task is graded as it says: by its own verifier, or by a judge and its rubric.

    judge: the name of that judge in options["judges"]; options: of the whole system. UserError for an unknown task, for
    one that this machine cannot grade, and for one that a model grades when there is no judge.
    """
    from glmv_jax.rl import tasks  # which imports the rules of this package

    def part(name: str) -> dict[str, Any]:
        task = tasks.get(name)
        if reason := task.missing():
            raise UserError(reason)
        if not task.rubric:
            return {"kind": "rule", "rule": f"tasks/{name}", "limit": task.seconds}
        if not judge:
            raise UserError(f"task {name} is graded by a model: name a judge, or leave the task out")
        return {"kind": "judge", "judge": judge, "rubric": task.rubric, "box": False, "longest": LONGEST_UNBOXED}

    return {**options, "sources": {name: {"parts": {"task": part(name)}} for name in names}}
