"""Anthropic's messages: a body to what is asked, an answer to a body or to events.

What clients send beyond the documented minimum is taken: messages of the role system among the others, images inside
`tool_result`, turns that mix results and text, and any unknown field. Films are blocks of the type `video` with the
sources that images have, which is no part of Anthropic's API but what others that serve models which see films take
(MiniMax's compatible API of November 2026). Thinking is on where the request turns it on,
and as the model was made where it is `adaptive`, which Claude Code always sends; its budget is not kept. A turn that
the client has begun for the assistant is refused.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmv_jax.data import chat_template
from glmv_jax.serving import fields
from glmv_jax.serving.answers import Asked, Ended, Part, Prepared, told
from glmv_jax.serving.limits import Limits, Refused
from glmv_jax.serving.media import Gallery
from glmv_jax.serving.reply import Called, Said, Thought
from glmv_jax.serving.turns import in_call_order
from glmv_jax.typing import UserError

UNSERVED: dict[str, tuple[Any, ...]] = {"top_k": (), "mcp_servers": ([],), "output_format": (), "container": ()}
Block = Mapping[str, Any]


def asked(body: Mapping[str, Any], limits: Limits, *, counted: bool = False) -> Asked:
    """What a body asks. counted: only to be counted, so that max_tokens may be missing. Raises Refused."""
    fields.without(body, UNSERVED)
    fields.without(fields.get(body, "output_config", dict, {}), {"format": ()})
    gallery = Gallery(limits)
    messages = list(_system(body.get("system")))
    for n, message in enumerate(fields.need(body, "messages", list)):
        messages += _message(fields.of(dict, message, f"messages[{n}]"), f"messages[{n}]", gallery)
    if messages and messages[-1]["role"] == "assistant":
        raise Refused("the last message is the assistant's, and answers are not begun for it here; end with the user's",
                      field="messages")  # fmt: skip
    try:
        messages = chat_template.checked(in_call_order(messages))
    except UserError as error:
        raise Refused(str(error), field="messages") from None
    tools, call = _tools(body)
    if not counted:
        fields.need(body, "max_tokens", int)
    thinking = fields.get(fields.get(body, "thinking", dict, {}), "type", str, "disabled", "thinking.")
    if thinking not in ("enabled", "adaptive", "disabled"):
        raise Refused(
            f"thinking.type={thinking!r:.40} is not known; use enabled, adaptive or disabled", field="thinking"
        )
    return Asked(
        messages, gallery.decoded(), tools, call, films=gallery.films,
        thinking=None if thinking == "adaptive" else thinking == "enabled",
        one_call=fields.get(fields.get(body, "tool_choice", dict, {}), "disable_parallel_tool_use", bool, False),
        tokens=fields.within(body, "max_tokens", int, 1, 1 << 30),
        temperature=fields.within(body, "temperature", float, 0, 100), top_p=fields.probability(body, "top_p"),
        stop=fields.texts(body, "stop_sequences", 16),
    )  # fmt: skip


def _system(system: Any) -> Iterator[dict[str, Any]]:
    if system:
        blocks = [{"type": "text", "text": system}] if isinstance(system, str) else fields.of(list, system, "system")
        text = [{"type": "text", "text": _text(block, f"system[{n}]")} for n, block in enumerate(blocks)]
        yield {"role": "system", "content": text}


def _text(block: Any, where: str) -> str:
    if fields.need(fields.of(dict, block, where), "type", str, f"{where}.") != "text":
        raise Refused(f"{where} is of type {block['type']!r:.40}, where only text can be", field=where)
    return fields.need(block, "text", str, f"{where}.")


def _message(message: Block, where: str, gallery: Gallery) -> list[dict[str, Any]]:
    """A message as those of OpenAI's API that it is: each result of a tool is one."""
    role, content = fields.need(message, "role", str, f"{where}."), message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    blocks = [fields.of(dict, b, f"{where}.content[{n}]")
              for n, b in enumerate(fields.of(list, blocks, f"{where}.content"))]  # fmt: skip
    if role == "system":
        return list(_system(blocks))
    if role == "assistant":
        return [_said(blocks, f"{where}.content")]
    if role != "user":
        raise Refused(f"{where}.role={role!r:.40} is not known; use user, assistant or system", field=f"{where}.role")
    found: list[dict[str, Any]] = []
    for n, block in enumerate(blocks):
        here = f"{where}.content[{n}]"
        if block.get("type") == "tool_result":
            inner = block.get("content") or ""
            inner = [{"type": "text", "text": inner}] if isinstance(inner, str) else inner
            parts = [_part(b, f"{here}.content[{m}]", gallery)
                     for m, b in enumerate(fields.of(list, inner, f"{here}.content"))]  # fmt: skip
            of = fields.get(block, "tool_use_id", str, where=f"{here}.")
            found.append({"role": "tool", "content": parts, "tool_call_id": of})
            continue
        if not found or found[-1]["role"] != "user":
            found.append({"role": "user", "content": []})
        found[-1]["content"].append(_part(block, here, gallery))
    return found or [{"role": "user", "content": ""}]


def _said(blocks: Sequence[Block], where: str) -> dict[str, Any]:
    """A turn of the assistant."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    for n, block in enumerate(blocks):
        here = f"{where}[{n}]."
        kind = fields.need(block, "type", str, here)
        if kind == "text":
            message["content"] += fields.need(block, "text", str, here)
        elif kind == "thinking":
            message["reasoning_content"] += fields.need(block, "thinking", str, here)
        elif kind == "tool_use":
            call = {
                "name": fields.need(block, "name", str, here),
                "arguments": fields.get(block, "input", dict, {}, here),
            }
            message["tool_calls"].append({"id": fields.get(block, "id", str, where=here), "function": call})
        elif kind != "redacted_thinking":
            raise Refused(f"{where}[{n}] is of type {kind!r:.40}, which is not served in an assistant's turn; leave it "
                          "out", field=f"{where}[{n}]")  # fmt: skip
    return {key: value for key, value in message.items() if value or key in ("role", "content")}


def _part(block: Any, where: str, gallery: Gallery) -> dict[str, Any]:
    """Text, a picture or a film."""
    kind = fields.need(fields.of(dict, block, where), "type", str, f"{where}.")
    source = fields.get(block, "source", dict, {}, f"{where}.")
    if kind == "text":
        return {"type": "text", "text": fields.need(block, "text", str, f"{where}.")}
    if kind == "document" and source.get("type") == "text":
        return {"type": "text", "text": fields.need(source, "data", str, f"{where}.source.")}
    if kind not in ("image", "video"):
        raise Refused(f"{where} is of type {kind!r:.40}, which is not served; use text, image or video", field=where)
    by_data, by_url = {"image": (gallery.add_base64, gallery.add_url),
                       "video": (gallery.add_film_base64, gallery.add_film_url)}[kind]  # fmt: skip
    if source.get("type") == "base64":
        by_data(source.get("data"), f"{where}.source.data")
    elif source.get("type") == "url":
        by_url(source.get("url"), f"{where}.source.url")
    else:
        raise Refused(f"{where}.source is no base64; send the {kind} so", field=f"{where}.source")
    return {"type": kind}


def _tools(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool | str]:
    """The tools as OpenAI's API has them, and whether one has to be called, or which."""
    tools, names = [], []
    for n, tool in enumerate(fields.get(body, "tools", list, [])):
        where = f"tools[{n}]."
        kind = fields.get(fields.of(dict, tool, where[:-1]), "type", str, "custom", where)
        if kind != "custom":
            raise Refused(f"{where}type={kind!r:.60} is a tool of another server; leave it out", field=f"{where}type")
        names.append(fields.need(tool, "name", str, where))
        about = {"description": fields.get(tool, "description", str, "", where),
                 "parameters": fields.get(tool, "input_schema", dict, {}, where)}  # fmt: skip
        tools.append({"type": "function", "function": {"name": names[-1]} | {k: v for k, v in about.items() if v}})
    choice = fields.get(body, "tool_choice", dict, {})
    kind = fields.get(choice, "type", str, "auto", "tool_choice.")
    if kind == "tool" and choice.get("name") not in names or kind == "any" and not tools:
        raise Refused(f"tool_choice asks for {choice.get('name')!r:.60}, which is not among the tools",
                      field="tool_choice")  # fmt: skip
    if kind not in ("auto", "any", "tool", "none"):
        raise Refused(f"tool_choice.type={kind!r:.40} is not known; use auto, any, tool or none", field="tool_choice")
    return ([], False) if kind == "none" else (tools, choice["name"] if kind == "tool" else kind == "any")


# --- answers ----------------------------------------------------------------------------------------------------------


class Reply:
    """Makes the bodies of one reply. name: of the model."""

    def __init__(self, name: str, body: Mapping[str, Any], prepared: Prepared, tokenizer: Any) -> None:
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": name}
        self._prompt = len(prepared.prompt.tokens)
        self._kind: type | None = None
        self._block = -1  # of a stream: the block that is open, and of which events it is

    def whole(self, choices: list[list[Part | Ended]]) -> dict[str, Any]:
        """The body of an answer that is whole."""
        parts, ended = told(choices[0])
        content: list[dict[str, Any]] = []
        for event in (event for part in parts for event in part.events):
            kind = _KINDS[type(event)]
            if isinstance(event, Called) or not content or content[-1]["type"] != kind:
                content.append(_empty(event))
            if isinstance(event, Called):
                content[-1]["input"] = event.arguments
            else:
                content[-1][kind] += event.text
        return self._head | {"content": content, "usage": self._used(ended.tokens)} | _reason(ended)

    def first(self) -> list[dict[str, Any]]:
        """Events with which a stream begins."""
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self._used(0)}
        return [{"type": "message_start", "message": self._head | empty}]

    def part(self, n: int, part: Part | Ended) -> list[dict[str, Any]]:
        """Events of some more of the answer."""
        if isinstance(part, Ended):
            end = {"type": "message_delta", "delta": _reason(part), "usage": {"output_tokens": part.tokens}}
            return [*self._closed(), end, {"type": "message_stop"}]
        events = []
        for event in part.events:
            if self._kind is not type(event) or isinstance(event, Called):
                events += self._closed()
                self._block, self._kind = self._block + 1, type(event)
                events.append({"type": "content_block_start", "index": self._block, "content_block": _empty(event)})
            events.append({"type": "content_block_delta", "index": self._block, "delta": _delta(event)})
        return events

    def last(self) -> list[dict[str, Any]]:
        """Nothing: `message_stop` has ended the stream."""
        return []

    def _closed(self) -> list[dict[str, Any]]:
        return [] if self._kind is None else [{"type": "content_block_stop", "index": self._block}]

    def _used(self, drawn: int) -> dict[str, int]:
        return {"input_tokens": self._prompt, "output_tokens": drawn}


_KINDS = {Thought: "thinking", Said: "text", Called: "tool_use"}


def _empty(event: Thought | Said | Called) -> dict[str, Any]:
    """A block before anything is in it."""
    if isinstance(event, Called):
        return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": event.name, "input": {}}
    return {"type": "thinking", "thinking": "", "signature": ""} if isinstance(event, Thought) else {
        "type": "text", "text": ""}  # fmt: skip


def _delta(event: Thought | Said | Called) -> dict[str, Any]:
    if isinstance(event, Called):
        return {"type": "input_json_delta", "partial_json": json.dumps(event.arguments, ensure_ascii=False)}
    kind = _KINDS[type(event)]
    return {"type": f"{kind}_delta", kind: event.text}


def _reason(ended: Ended) -> dict[str, Any]:
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[ended.reason]
    return {"stop_reason": reason if ended.stop is None else "stop_sequence", "stop_sequence": ended.stop}


def error(refused: Exception, status: int) -> dict[str, Any]:
    """The body of an error, and its event."""
    kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
             503: "overloaded_error"}  # fmt: skip
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(refused)}}
