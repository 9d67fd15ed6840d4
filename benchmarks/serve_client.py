"""One question to a server over a socket of its own, in either wire format, and when each piece of the answer came.

Written by hand, without the server's code or a client library: two hundred of these share a core with what they
measure. A stream counts as ended only by what its format ends with, in the order that it prescribes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}


@dataclasses.dataclass
class Question:
    """wire: "openai" or "anthropic".   kind: what it is counted under.   wanted: tokens of its answer at most.
    leave: pieces after which the client goes, patience: seconds; None to stay.   same: of questions that are to be
    answered alike."""

    wire: str
    kind: str
    body: dict[str, Any]
    wanted: int
    leave: int | None = None
    patience: float | None = None
    same: str = ""


@dataclasses.dataclass
class Outcome:
    """What became of it. how: "finished", "left" (by the client), "refused" (with a status), "told" (an error event in
    a stream, well-formed), or "lost", with why.   Times in seconds since `asked`, a time of the monotonic clock."""

    question: Question
    asked: float
    how: str = "lost"
    why: str = ""
    status: int = 0
    after: float | None = None
    headed: float | None = None
    pieces: list[float] = dataclasses.field(default_factory=list)
    pings: int = 0
    tokens: int = 0
    took: float = 0.0
    text: str = ""


class Broken(Exception):
    """An answer that is not as its format has it."""


async def ask(port: int, question: Question, key: str = "") -> Outcome:
    """Puts a question and follows its answer to the end; nothing is raised but being cancelled."""
    outcome, writer = Outcome(question, time.monotonic()), None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        data = json.dumps(question.body).encode()
        head = (f"POST {PATHS[question.wire]} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"x-api-key: {key}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n")  # fmt: skip
        writer.write(head.encode() + data)
        async with asyncio.timeout(question.patience):
            await _follow(reader, outcome)
    except TimeoutError:
        outcome.how = "left"
    except (OSError, EOFError, Broken, ValueError, LookupError) as error:  # whatever it is, the answer is lost
        outcome.why = outcome.why or f"{type(error).__name__}: {error}"[:200]
    finally:
        outcome.took = time.monotonic() - outcome.asked
        if writer is not None:
            writer.close()
    return outcome


async def _follow(reader: asyncio.StreamReader, outcome: Outcome) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    outcome.headed, outcome.status = time.monotonic() - outcome.asked, int(head[0].split()[1])
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    if outcome.status != 200 or not outcome.question.body.get("stream"):
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        return _whole(outcome, body, headers)
    if headers["content-type"].split(";")[0] != "text/event-stream":
        raise Broken(f"a stream of type {headers['content-type']}")
    stream = _OpenAI(outcome) if outcome.question.wire == "openai" else _Anthropic(outcome)
    async for block in _events(_chunks(reader)):
        if stream.over:
            raise Broken("something came behind the end")
        stream.block(block)
        if outcome.question.leave is not None and len(outcome.pieces) >= outcome.question.leave:
            outcome.how = "left"
            return
    if not stream.over:
        raise Broken("the stream stopped before its end")
    outcome.how = "told" if stream.error else "finished"
    outcome.why = stream.error


def _whole(outcome: Outcome, body: dict[str, Any], headers: dict[str, str]) -> None:
    if outcome.status != 200:
        outcome.how, outcome.why = "refused", str(body["error"]["message"])
        outcome.after = float(headers["retry-after"]) if "retry-after" in headers else None
        if outcome.status in (429, 503) and outcome.after is None:
            raise Broken(f"a status {outcome.status} without Retry-After")
        return
    outcome.pieces.append(time.monotonic() - outcome.asked)
    if outcome.question.wire == "openai":
        (choice,) = body["choices"]
        ended, outcome.tokens = choice["finish_reason"], body["usage"]["completion_tokens"]
    else:
        ended, outcome.tokens = body["stop_reason"], body["usage"]["output_tokens"]
    if ended is None:
        raise Broken("an answer without a reason why it ended")
    outcome.how = "finished"


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """What chunked transfer brings; a connection that ends before its last chunk raises."""
    while size := int(await reader.readline() or b"no chunk", 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Blocks of lines, however they were cut."""
    held = b""
    async for chunk in chunks:
        *blocks, held = (held + chunk).split(b"\n\n")
        for block in blocks:
            yield block.decode()
    if held:
        raise Broken(f"half an event: {held[:80]!r}")


class _Stream:
    """over: it has ended as it has to; error: what an error event said."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome, self.over, self.error = outcome, False, ""

    def piece(self, text: str) -> None:
        self.outcome.pieces.append(time.monotonic() - self.outcome.asked)
        self.outcome.text += text

    def fail(self, error: dict[str, Any]) -> None:
        self.error, self.over = f"{error['type']}: {error['message']}", True


class _OpenAI(_Stream):
    reason: str | None = None

    def block(self, block: str) -> None:
        if block.startswith(":"):
            self.outcome.pings += 1
            return
        if not block.startswith("data: "):
            raise Broken(f"no event of this format: {block[:80]!r}")
        if block == "data: [DONE]":
            if self.reason is None or not self.outcome.tokens:
                raise Broken("[DONE] before a finish_reason and the usage that was asked for")
            self.over = True
            return
        chunk = json.loads(block[6:])
        if "error" in chunk:
            return self.fail(chunk["error"])
        if usage := chunk.get("usage"):
            self.outcome.tokens = usage["completion_tokens"]
        for choice in chunk["choices"]:
            if self.reason is not None:
                raise Broken("more of an answer behind its finish_reason")
            self.reason, delta = choice["finish_reason"], choice["delta"]
            calls = "".join(json.dumps(call["function"]) for call in delta.get("tool_calls", ()))
            if text := delta.get("content") or delta.get("reasoning_content") or calls:
                self.piece(text)


class _Anthropic(_Stream):
    """Each event's name is its type; blocks open and close one after the other between start, delta and stop."""

    before = ""
    block_open = -1
    blocks = 0

    def block(self, block: str) -> None:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        kind = event["type"]
        if name != f"event: {kind}":
            raise Broken(f"{name!r} with data of type {kind}")
        if kind == "ping":
            self.outcome.pings += 1
            return
        if kind == "error":
            return self.fail(event["error"])
        if (kind == "message_start") != (self.before == ""):
            raise Broken(f"{kind} behind {self.before or 'nothing'}")
        getattr(self, kind)(event)
        self.before = kind

    def message_start(self, event: dict[str, Any]) -> None: ...

    def content_block_start(self, event: dict[str, Any]) -> None:
        if self.block_open >= 0 or event["index"] != self.blocks:
            raise Broken("a block begins inside another, or is numbered wrongly")
        self.block_open, self.blocks = event["index"], self.blocks + 1

    def content_block_delta(self, event: dict[str, Any]) -> None:
        if event["index"] != self.block_open:
            raise Broken("a delta of a block that is not open")
        delta = event["delta"]
        self.piece(delta.get("text") or delta.get("thinking") or delta.get("partial_json") or "")

    def content_block_stop(self, event: dict[str, Any]) -> None:
        if event["index"] != self.block_open:
            raise Broken("a block ends that is not open")
        self.block_open = -1

    def message_delta(self, event: dict[str, Any]) -> None:
        if self.block_open >= 0 or not event["delta"]["stop_reason"]:
            raise Broken("a message ends with a block open, or without a reason")
        self.outcome.tokens = event["usage"]["output_tokens"]

    def message_stop(self, event: dict[str, Any]) -> None:
        if self.before != "message_delta":
            raise Broken("message_stop without message_delta")
        self.over = True
