"""One record of a person's own files: what it may say, and how it is read.

A record is a JSON object: a line of a .jsonl, a row of a parquet file, the .json of a sample in a tar. It is a text
with pictures,

    {"id": "page-1", "category": "ocr", "segments": [
        {"type": "text", "text": "Page 1"},
        {"type": "image", "image": "pages/1.png"},
        {"type": "text", "text": "what it says", "loss": 0.5},
        {"type": "video", "video": "clips/1.mp4"}]}

or a conversation with the fields of OpenAI's API:

    {"tools": [{"type": "function", "function": {"name": "click", "parameters": {...}}}], "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "screen.png"}, {"type": "text", "text": "Press OK."}]},
        {"role": "assistant", "reasoning_content": "It is below.", "content": "", "tool_calls": [
            {"function": {"name": "click", "arguments": {"x": 5, "y": 9}}}]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "Pressed.", "weight": 1.0}]}

segments    in reading order. `loss`, 1 if not given: the loss weight of a text's tokens, 0 for context only.
messages    `content` is a text or a list of parts; `reasoning_content` is thinking; `arguments` are an object or its
            JSON; an observation has the role "tool". `weight`, 1 if not given: of what an assistant's message says.
image, video  where the picture or film is: a path relative to the file (or absolute); a data URI; {"bytes": ..} (in
            JSON as base64), {"path": ..} or {"url": ..} with one of these; in a tar the file's extension ("0.png") or
            name; beside a .jsonl also the name of a file in a tar of its stem (a.jsonl, a.tar). OpenAI's
            {"type": "image_url", "image_url": {"url": ..}} is an image too. A part that gives none takes the next of
            the record's `images` (or `videos`). Nothing is ever fetched from the network.
id          stable and unique, for logs; else the file and the line.
category    what the record teaches, any word; those of the report are CATEGORIES.
weight      of the whole record in the loss, 1 if not given.

Short forms: {"text": ..} is one segment; {"image": .. (or "file_name") or "images": [..], "text": ..} the pictures,
then the text.
LLaVA's form is read too: {"image": .., "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ..]}.
Any other field is left alone. In parquet, nested fields may be columns of structs or of JSON.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from glmv_jax.typing import UserError

CATEGORIES = (
    "world_knowledge", "interleaved", "ocr", "coding", "gui", "video", "tool_use", "spatial", "grounding", "academic",
)  # fmt: skip
ROLES = ("system", "user", "assistant", "tool")
Fetch = Callable[[str], bytes]  # the name of a file -> its content; UserError when there is none


@dataclasses.dataclass(frozen=True)
class Text:
    """A stretch of text and the loss weight of its tokens."""

    text: str
    loss: float = 1.0


@dataclasses.dataclass(frozen=True)
class Media:
    """A picture or film as its file's bytes. kind: "image" or "video"."""

    kind: str
    content: bytes


@dataclasses.dataclass(frozen=True)
class Record:
    """A document (`segments`) or a conversation (`messages`).

    messages: as in the file, but for contents: lists of {"type": "text", "text": ..}, {"type": "image"} and
    {"type": "video"}, the pictures and films of which are `media`, in reading order; and for tool calls:
    {"name": .., "arguments": {..}}. tools: as in the file.
    """

    id: str
    category: str = ""
    weight: float = 1.0
    segments: tuple[Text | Media, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    media: tuple[Media, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


def parse(fields: Mapping[str, Any], id_: str, fetch: Fetch) -> Record:
    """A record from its fields; id_ is used where it gives none. UserError: what is wrong with it."""
    fields = _given(fields)
    common: dict[str, Any] = {
        "id": str(fields.get("id", id_)), "category": str(fields.get("category", "")),
        "weight": _number("weight", fields.get("weight", 1.0)),
    }  # fmt: skip
    if "conversations" in fields and "messages" not in fields:
        fields = _of_llava(fields)
    media = _MediaReader(fields, fetch)
    if "messages" in fields:
        messages = tuple(_message(message, media) for message in _list("messages", fields["messages"]))
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError("no message of it is an assistant's; nothing could be learnt")
        tools = tuple(_list("tools", fields.get("tools", [])))
        record = Record(messages=messages, media=tuple(media.found), tools=tools, **common)
    else:
        segments = fields["segments"] if "segments" in fields else _short(fields)
        record = Record(segments=tuple(_segment(s, media) for s in _list("segments", segments)), **common)
        if not record.segments:
            raise UserError("it has no segments")
    if left := media.left():
        raise UserError(f"{left} of its images or videos belong to no part of it")
    return record


def asked(record: Record, prompt: str) -> Record:
    """A document of pictures and a text as a conversation: pictures and prompt, and the text as the answer."""
    media = tuple(segment for segment in record.segments if isinstance(segment, Media))
    text = "".join(segment.text for segment in record.segments if isinstance(segment, Text)).strip()
    question = [*({"type": each.kind} for each in media), {"type": "text", "text": prompt}]
    answer = {"content": [{"type": "text", "text": text}], "weight": 1.0, "tool_calls": []}
    messages = ({"role": "user", "content": question}, {"role": "assistant", **answer})
    return dataclasses.replace(record, segments=(), messages=messages, media=media)


def _segment(segment: Any, media: _MediaReader) -> Text | Media:
    segment = _given(segment)
    if segment.get("type") == "text":
        return Text(_text(segment), _number("loss", segment.get("loss", 1.0)))
    return media.read(segment)


def _short(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The segments of a record that has only pictures and a text."""
    shown = fields.get("image", fields.get("file_name"))
    parts: list[dict[str, Any]] = [{"type": "image", "image": shown}] if shown is not None else []
    parts += [{"type": kind} for kind in ("image", "video") for _ in fields.get(f"{kind}s", ())]
    if "text" in fields:
        text = fields["text"]
        parts.append({"type": "text", "text": text.decode() if isinstance(text, bytes) else text})
    if not parts:
        raise UserError(f"it has neither segments nor messages nor text, only {', '.join(sorted(fields)) or 'nothing'}")
    return parts


_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
             "observation": "tool"}  # fmt: skip


def _of_llava(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation as LLaVA and ShareGPT have it, in our form."""
    messages = []
    for turn in map(_given, _list("conversations", fields["conversations"])):
        if turn.get("from") not in _SPEAKERS or not isinstance(turn.get("value"), str):
            raise UserError(f"a turn is from {turn.get('from')!r}; use {', '.join(_SPEAKERS)} with a text as value")
        parts = [{"type": part[1:-1]} if part in ("<image>", "<video>") else {"type": "text", "text": part.strip("\n")}
                 for part in re.split("(<image>|<video>)", turn["value"])]  # fmt: skip
        messages.append({"role": _SPEAKERS[turn["from"]], "content": [p for p in parts if p.get("text") != ""]})
    given = {f"{kind}s": fields.get(f"{kind}s", fields.get(kind, [])) for kind in _KINDS}
    return {"messages": messages, **{k: v if isinstance(v, list) else [v] for k, v in given.items()},
            "tools": fields.get("tools", [])}  # fmt: skip


def _message(message: Any, media: _MediaReader) -> dict[str, Any]:
    message = _given(message)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise UserError(f"a message's role is {role!r}; use {', '.join(ROLES)}")
    content = message.get("content", "")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else _list("content", content)
    read: dict[str, Any] = {"role": role, "content": [_part(part, media) for part in parts]}
    if role == "assistant":
        read["weight"] = _number("weight", message.get("weight", 1.0))
        read["tool_calls"] = [_call(call) for call in _list("tool_calls", message.get("tool_calls", []))]
        if "reasoning_content" in message:
            read["reasoning_content"] = str(message["reasoning_content"])
    return read


def _part(part: Any, media: _MediaReader) -> dict[str, Any]:
    part = _given(part)
    if part.get("type") == "text":
        return {"type": "text", "text": _text(part)}
    found = media.read(part)
    media.found.append(found)
    return {"type": found.kind}


def _call(call: Any) -> dict[str, Any]:
    call = _given(call)
    function = _given(call.get("function", call))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json("the arguments of a tool call", arguments or "{}")
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        raise UserError("a tool call needs a name, and arguments that are an object")
    return {"name": function["name"], "arguments": dict(arguments)}


class _MediaReader:
    """Reads what parts point to; those that point to nothing take the record's `images` and `videos` in turn."""

    def __init__(self, fields: Mapping[str, Any], fetch: Fetch) -> None:
        self._fetch = fetch
        self._next: dict[str, Iterator[Any]] = {k: iter(_list(f"{k}s", fields.get(f"{k}s", []))) for k in _KINDS}
        self.found: list[Media] = []

    def read(self, part: Mapping[str, Any]) -> Media:
        kind = part.get("type")
        kind = kind.removesuffix("_url") if isinstance(kind, str) else kind
        if kind not in _KINDS:
            raise UserError(f"a part of type {kind!r}; use text, image or video")
        given = part.get(kind, part.get(f"{kind}_url"))
        if given is None:
            given = next(self._next[kind], None)
        if given is None:
            raise UserError(f"a part of type {kind!r} says nowhere where its {kind} is")
        return Media(kind, _content(given, self._fetch))

    def left(self) -> int:
        return sum(1 for waiting in self._next.values() for _ in waiting)


_KINDS = ("image", "video")


def _content(given: Any, fetch: Fetch) -> bytes:
    """The bytes that a part's value is, or points to."""
    if isinstance(given, Mapping):
        if isinstance(given.get("bytes"), str):
            return _base64(given["bytes"])
        given = given.get("bytes") or given.get("path") or given.get("url")
    if isinstance(given, (bytes, bytearray)) and given:
        return bytes(given)
    if not isinstance(given, str) or not given:
        raise UserError(f"an image or video is given as {type(given).__name__}, not as a path, data URI or bytes")
    if given.startswith("data:"):
        head, _, body = given.partition(",")
        if not head.endswith(";base64"):
            raise UserError(f"a data URI that is not base64 ({head[:40]})")
        return _base64(body)
    if given.startswith(("http://", "https://")):
        raise UserError(f"{given[:80]} is on the network, from which nothing is fetched; copy it to disk")
    return fetch(given.removeprefix("file://"))


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"its base64 is broken ({error})") from None


def _given(value: Any) -> dict[str, Any]:
    """The fields of an object that are not null; none of something else."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}


def _list(name: str, value: Any) -> list[Any]:
    value = _json(name, value) if isinstance(value, (str, bytes)) else value
    if not isinstance(value, (list, tuple)):
        raise UserError(f"its {name} are {type(value).__name__}, not a list")
    return list(value)


def _json(name: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: broken JSON ({error})") from None


def _text(part: Mapping[str, Any]) -> str:
    if not isinstance(part.get("text"), str):
        raise UserError(f"a text is {type(part.get('text')).__name__}, not text")
    return part["text"]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise UserError(f"its {name} is {value!r}, not a number from 0")
    return float(value)
