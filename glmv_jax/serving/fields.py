"""Fields of a JSON body, checked. What is wrong raises Refused and names the field; unknown fields are left alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from glmv_jax.serving.limits import Refused

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
          dict: "an object"}  # fmt: skip


def parsed(body: bytes) -> dict[str, Any]:
    """The object that a body is."""
    try:
        found = json.loads(body, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # halves of characters
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["nested too deeply"])[0]
        raise Refused(f"the body is no JSON in UTF-8 ({reason[:100]}); send an object") from None
    return of(dict, found, "the body")


def of(kind: type[T], value: Any, name: str) -> T:
    """The value, if it is of that type; a whole number is a number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole or isinstance(value, float) if kind is float else whole if kind is int else isinstance(value, kind)
    if not fits:
        raise Refused(f"{name} has to be {_WORDS[kind]}, not {_short(value)}", field=name)
    return value


def get(body: Mapping[str, Any], name: str, kind: type[T], default: Any = None, where: str = "") -> Any:
    """A field, `default` where it is missing or null."""
    value = body.get(name)
    return default if value is None else of(kind, value, where + name)


def need(body: Mapping[str, Any], name: str, kind: type[T], where: str = "") -> T:
    """A field that there has to be."""
    if body.get(name) is None:
        raise Refused(f"{where + name} is missing; give {_WORDS[kind]}", field=where + name)
    return of(kind, body[name], where + name)


def within(body: Mapping[str, Any], name: str, kind: type[T], low: float, high: float) -> Any:
    """A number from `low` to `high`, None where there is none."""
    value = get(body, name, kind)
    if value is not None and not low <= value <= high:
        raise Refused(f"{name}={_short(value)} is out of range; give {low:g} to {high:g}", field=name)
    return value


def probability(body: Mapping[str, Any], name: str) -> float | None:
    """A number above 0 and up to 1, None where there is none."""
    value = within(body, name, float, 0, 1)
    if value == 0:
        raise Refused(f"{name}=0 keeps no token; give more than 0, or temperature=0 for the likeliest", field=name)
    return value


def texts(body: Mapping[str, Any], name: str, most: int) -> tuple[str, ...]:
    """A text or a list of some, none of them empty."""
    value = body.get(name)
    value = [] if value is None else [value] if isinstance(value, str) else of(list, value, name)
    if len(value) > most or any(not of(str, text, name) for text in value):
        raise Refused(f"{name} has to be up to {most} texts, none of them empty", field=name)
    return tuple(value)


def without(body: Mapping[str, Any], unserved: Mapping[str, Sequence[Any]]) -> None:
    """Refuses fields that would change the answer and that there are not here, unless they ask for what is done anyway
    (or are null)."""
    for name, harmless in unserved.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            raise Refused(f"{name}={_short(value)} is not served; leave it out", field=name)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")
