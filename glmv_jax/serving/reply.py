"""Token ids of an answer -> what it says: thinking, text with its boxes, and tool calls.

    {thinking}</think>{text}<tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>{stop}

Reading is of ids, not of text, so a tag spelled letter by letter is text, and it does not matter where the stream is
cut. It is total, and nothing is lost: a call is told when it is whole, so that none is cut short and none has half a
name; one that is not of this form, or that the end cuts off, is told as the text that was written. A call that begins
inside thinking ends the thinking. Spaces around thinking and text do not count, nor the line breaks of the older
dialect (`data.dialect.SPACED`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from glmv_jax.serving.text import Decoder, Stripped, UpTo


class Thought(NamedTuple):
    """Some more thinking."""

    text: str


class Said(NamedTuple):
    """Some more text, boxes by the names of their tokens."""

    text: str


class Called(NamedTuple):
    """A whole tool call."""

    name: str
    arguments: dict[str, Any]


Event = Thought | Said | Called


class Reader:
    """Reads one answer.

    tools: those that were announced, as OpenAI's API has them; without any a call is text.
    thinking: whether the prompt opened the turn for thinking.   stop: texts that end the answer where they are said.
    stopped: the stop string that ended it, None so far.
    """

    def __init__(
        self, tokenizer: Any, stops: Iterable[int], tools: Sequence[Mapping[str, Any]] = (), thinking: bool = False,
        stop: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._tokenizer, self._stops = tokenizer, frozenset(stops)
        self._names = {i: name for name, i in tokenizer.special.items()}
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._kind: type[Thought] | type[Said] = Thought if thinking else Said
        self._decoder, self._spaces, self._up_to = Decoder(tokenizer.decode), Stripped(), UpTo(stop)
        self._call: list[int] | None = None  # ids of a call under way
        self._over = False

    @property
    def stopped(self) -> str | None:
        return self._up_to.found

    def feed(self, ids: Iterable[int]) -> list[Event]:
        """What some more ids say; neighbours of one kind in one event."""
        return joined(event for i in ids for event in self._read(int(i)))

    def end(self) -> list[Event]:
        """What was held back, when no more ids will come."""
        return joined(self._close())

    # --- one id -------------------------------------------------------------------------------------------------------

    def _read(self, i: int) -> Iterator[Event]:
        if self._over or self.stopped is not None:
            return
        name = self._names.get(i)
        if i in self._stops:
            yield from self._close()
        elif self._call is not None and name != "<tool_call>":
            self._call.append(i)
            if name == "</tool_call>":
                yield from self._end_call(self._call)
        elif name is None:
            yield from self._text(self._decoder.push(i))
        else:
            yield from self._tag(i, name)

    def _tag(self, i: int, name: str) -> Iterator[Event]:
        yield from self._text(self._decoder.flush())
        if name == "<think>":
            yield from self._turn_to(Thought)
        elif name == "</think>":
            yield from self._turn_to(Said)
        elif name == "<tool_call>" and self._schemas:
            if self._call is not None:  # the one before was never closed
                yield from self._end_call(self._call)
            yield from self._turn_to(Said)
            self._call = [i]
        else:
            yield from self._text(name)

    def _text(self, text: str) -> Iterator[Event]:
        text = self._spaces.push(text)
        if self._kind is Said:
            text = self._up_to.push(text)
        if text:
            yield self._kind(text)

    def _turn_to(self, kind: type[Thought] | type[Said]) -> Iterator[Event]:
        if self._kind is not kind:
            if rest := self._up_to.flush():
                yield Said(rest)
            self._kind, self._spaces = kind, Stripped()

    def _close(self) -> Iterator[Event]:
        if self._over:
            return
        yield from self._text(self._decoder.flush())
        if self._call is not None:
            yield from self._end_call(self._call)
        if rest := self._up_to.flush():
            yield Said(rest)
        self._over = True

    def _end_call(self, ids: list[int]) -> Iterator[Event]:
        self._call = None
        call = _Call(ids, self._tokenizer, self._names).read(self._schemas)
        if call is None:
            yield from self._text(self._tokenizer.decode(ids, keep_special=True))
            return
        if rest := self._up_to.flush():
            yield Said(rest)
        yield call
        self._spaces = Stripped()


def joined(events: Iterable[Event]) -> list[Event]:
    """The same, texts of one kind that follow each other as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, (Thought, Said)) and isinstance(last, type(event)):
            found[-1] = type(event)(last.text + event.text)
        else:
            found.append(event)
    return found


# --- calls ------------------------------------------------------------------------------------------------------------


class _Call:
    """Reads the ids of one call, from left to right."""

    def __init__(self, ids: Sequence[int], tokenizer: Any, names: Mapping[int, str]) -> None:
        self._parts: list[tuple[str, str]] = []  # (special token, "") or ("", text)
        run: list[int] = []
        for i in [*ids, None]:
            if i is not None and i not in names:
                run.append(i)
                continue
            if text := tokenizer.decode(run):
                self._parts.append(("", text))
            run = []
            if i is not None:
                self._parts.append((names[i], ""))
        self._at = 1  # behind <tool_call>

    def read(self, schemas: Mapping[str, Mapping[str, Any]]) -> Called | None:
        """None when it is none."""
        name, arguments = self._text().strip(), {}
        types = schemas.get(name, {}).get("properties")
        types = types if isinstance(types, Mapping) else {}
        while self._take("<arg_key>"):
            key = self._text()
            if not (self._take("</arg_key>") and not self._text().strip() and self._take("<arg_value>")):
                return None
            value = self._text()
            if not self._take("</arg_value>") or self._text().strip():
                return None
            arguments[key] = value_of(value, types.get(key, {}))
        whole = self._take("</tool_call>") and self._at == len(self._parts)
        return Called(name, arguments) if name and whole else None

    def _take(self, tag: str) -> bool:
        found = self._at < len(self._parts) and self._parts[self._at][0] == tag
        self._at += found
        return found

    def _text(self) -> str:
        if self._at < len(self._parts) and not self._parts[self._at][0]:
            self._at += 1
            return self._parts[self._at - 1][1]
        return ""


_JSON = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


def value_of(text: str, schema: Any) -> Any:
    """An argument, of which a text stands as it is and anything else as JSON: which of them it is, its schema says.

    What is no JSON of a type that the schema lets in stays text; without a schema, what is no JSON.
    """
    types = _types(schema)
    if types == {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999 and half a character can be read only
    except (ValueError, RecursionError):
        return text
    kind = _JSON.get(type(value), "string")
    return value if not types or kind in types or (kind == "integer" and "number" in types) else text


def _types(schema: Any) -> set[str]:
    """Names of the types that a JSON schema lets in; none where it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    listed = lambda name: x if isinstance(x := schema.get(name, []), list) else [x]  # noqa: E731
    types = {name for name in listed("type") if isinstance(name, str)}
    for inner in (*listed("anyOf"), *listed("oneOf")):
        types |= _types(inner)
    values = [schema["const"]] if "const" in schema else listed("enum")
    if not types and values and all(isinstance(value, str) for value in values):
        return {"string"}
    return types


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")
