"""A turn of the model as tokens, and back: the inverse of what `data.dialect` writes.

    {thinking}</think>{text}<tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>{stop}

Reading is of token ids, not of text: a `<tool_call>` spelled letter by letter is text. It is strict and total. Any ids
give an action; calls that are not exactly of this form, or not of a tool that there is with arguments as its schema
has them, give one that says what is wrong (`Action.malformed`) and calls nothing.

A value that is a text stands as it is and any other as JSON, so which of them `5` is, the schema says. Spaces around
thinking, text and names do not count, as they do not where conversations are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.data.dialect import COMPACT, Dialect
from glmv_jax.data.tokenizer import BOX
from glmv_jax.inference.text import answer_text
from glmv_jax.rl.gym import Action

# The special tokens that a turn may hold, beside those that end it.
DRAWN = (*BOX, "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

# What JSON calls the types that `json` makes; a bool is no number.
_IS = {
    "string": lambda x: isinstance(x, str),
    "integer": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "number": lambda x: isinstance(x, (int, float)) and not isinstance(x, bool),
    "boolean": lambda x: isinstance(x, bool),
    "array": lambda x: isinstance(x, list),
    "object": lambda x: isinstance(x, dict),
    "null": lambda x: x is None,
}


class Malformed(Exception):
    """What is wrong with a turn, in words for the model that wrote it."""


def spoken(action: Action, tokenizer: Any, thinking: bool = False, dialect: Dialect = COMPACT) -> list[int]:
    """The ids a model would have drawn to say this, the stop token included.

    thinking: whether the turn was opened for thinking (`Dialect.opening`).
    """
    message = {"role": "assistant", "content": action.text, "tool_calls": action.tool_calls,
               "reasoning_content": action.thinking}  # fmt: skip
    pieces = [p for p in dialect.pieces([message], (), lambda n: thinking) if p.by >= 0]
    ids = [] if action.thinking.strip() or not thinking else [tokenizer.special["</think>"]]
    for piece in pieces:
        if piece.kind == "tag":
            ids.append(tokenizer.special[piece.text])
        else:
            ids += tokenizer.encode_with_specials(piece.text, BOX if piece.kind == "answer" else ())
    return [*ids, tokenizer.special["<|observation|>" if action.tool_calls else "<|endoftext|>"]]


def parse(
    ids: Sequence[int] | np.ndarray,
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = False,
) -> Action:
    """The action that a model's ids are. Never raises, whatever the ids.

    ids: as drawn, with or without the stop token.   tools: those that were announced.
    thinking: whether the turn was opened for thinking; then all of a turn without `</think>` is thinking.
    """
    ids = [int(i) for i in ids]
    if ids and ids[-1] in tokenizer.stops:
        ids = ids[:-1]
    special = tokenizer.special
    if special["</think>"] in ids:
        end = ids.index(special["</think>"])
        thought, rest = ids[:end], ids[end + 1 :]
    else:
        thought, rest = (ids, []) if thinking else ([], ids)
    at = rest.index(special["<tool_call>"]) if special["<tool_call>"] in rest else len(rest)
    text = answer_text(tokenizer, rest[:at]).strip()
    thought_text = tokenizer.decode(thought).strip()
    try:
        _check_specials(rest[:at], tokenizer)
        calls = _Calls(rest[at:], tokenizer).read(tools)
    except Malformed as wrong:
        return Action(text, thought_text, (), str(wrong))
    return Action(text, thought_text, calls)


def _check_specials(ids: Sequence[int], tokenizer: Any) -> None:
    names = {i: name for name, i in tokenizer.special.items() if name not in BOX}
    found = next((names[i] for i in ids if i in names), None)
    if found:
        raise Malformed(f"{found} has no place in a text")


class _Calls:
    """Reads calls from ids, from left to right."""

    def __init__(self, ids: Sequence[int], tokenizer: Any):
        self._tokenizer = tokenizer
        self._names = {i: name for name, i in tokenizer.special.items()}
        self._ids, self._at = ids, 0

    def read(self, tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        schemas = {tool["name"]: tool for tool in (tool.get("function", tool) for tool in tools)}
        calls = []
        while self._at < len(self._ids):
            calls.append(self._call(schemas))
            self._nothing()
        return tuple(calls)

    def _call(self, schemas: Mapping[str, Any]) -> Mapping[str, Any]:
        self._tag("<tool_call>")
        name = self._text().strip()
        if name not in schemas:
            raise Malformed(f"there is no tool {name[:40]!r}; there are: {', '.join(schemas) or 'none'}")
        schema = schemas[name].get("parameters", {})
        known, arguments = schema.get("properties", {}), {}
        while self._next() == "<arg_key>":
            key = self._between("arg_key")
            self._nothing()
            value = self._between("arg_value")
            self._nothing()
            if key not in known or key in arguments:
                reason = "twice the argument" if key in arguments else "no argument"
                raise Malformed(f"{name} has {reason} {key[:40]!r}; it takes: {', '.join(known) or 'none'}")
            arguments[key] = _value(value, known[key], f"{key} of {name}")
        self._tag("</tool_call>")
        missing = [key for key in schema.get("required", ()) if key not in arguments]
        if missing:
            raise Malformed(f"{name} needs {', '.join(missing)}")
        return {"name": name, "arguments": arguments}

    def _next(self) -> str:
        """The special token that comes next, "" for text and for the end."""
        return self._names.get(self._ids[self._at], "") if self._at < len(self._ids) else ""

    def _tag(self, name: str) -> None:
        if self._next() != name:
            there = self._next() or ("text" if self._at < len(self._ids) else "the end")
            raise Malformed(f"{name} should stand where {there} is")
        self._at += 1

    def _text(self) -> str:
        start = self._at
        while self._at < len(self._ids) and self._ids[self._at] not in self._names:
            self._at += 1
        return self._tokenizer.decode(self._ids[start : self._at])

    def _nothing(self) -> None:
        text = self._text().strip()
        if text:
            raise Malformed(f"the text {text[:40]!r} stands inside or behind a call")

    def _between(self, tag: str) -> str:
        self._tag(f"<{tag}>")
        text = self._text()
        self._tag(f"</{tag}>")
        return text


def _is(value: Any, types: Sequence[str]) -> bool:
    return any(_IS[name](value) for name in types)


def _value(text: str, schema: Mapping[str, Any], what: str) -> Any:
    """An argument's value by its schema: type (one, several, or none given) and enum."""
    types = schema.get("type", ())
    types = (types,) if isinstance(types, str) else tuple(types)
    value = text
    if types != ("string",):
        try:
            value = _json(text)
        except Malformed as wrong:
            if types and "string" not in types:
                raise Malformed(f"{what} should be of type {' or '.join(types)}: {wrong}") from None
        if types and not _is(value, types):
            value = text  # a text that happens to be JSON of a type that is not among them
    if types and not _is(value, types):
        raise Malformed(f"{what} should be of type {' or '.join(types)}, not {text[:40]!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise Malformed(f"{what} should be one of {', '.join(map(str, schema['enum']))}, not {text[:40]!r}")
    return value


def _json(text: str) -> Any:
    """Of standard JSON that can be written again: no NaN, no half of a surrogate pair, no bottomless nesting."""
    try:
        value = json.loads(text, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{text[:40]!r} is no JSON ({str(error)[:60]})") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")
