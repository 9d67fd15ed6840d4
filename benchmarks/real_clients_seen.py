"""What a client asked a `real_clients_server.Served`: pictures, tools, and what our server did not read of it."""

from __future__ import annotations

import asyncio
import base64
import collections
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from real_clients_server import ASKED, NAME, Exchange, Served

from glmv_jax.data.hashes import image_hash
from glmv_jax.data.naflex import load_image
from glmv_jax.serving import anthropic, openai
from glmv_jax.serving.answers import Prepared

FORMS = dict(zip(ASKED, (anthropic, openai)))
_OPAQUE = ("input_schema", "parameters", "input")  # objects of the client's tools, which are handed on as they are


def asked(served: Served, picture: pathlib.Path) -> dict[str, Any]:
    """What is told of all requests. picture: the file that the client was asked about."""
    questions = [exchange for exchange in served.exchanges if exchange.asks and exchange.status == 200]
    unread, prompts, pictures, counts = set(), [], [], []
    for exchange in questions:
        prepared, left = understood(served, exchange)
        unread |= left
        prompts.append(len(prepared.prompt.tokens))
        pictures = [arrived(served, prepared, n, file, picture) for n, file in enumerate(files(exchange.body))]
        counts.append(len(pictures))
    headers = [exchange.headers for exchange in served.exchanges]
    last = questions[-1].body if questions else {"messages": []}
    return {
        "requests": dict(collections.Counter(f"{e.method} {e.path} {e.status}" for e in served.exchanges)),
        "refused": [e.reply[:300] for e in served.exchanges if e.asks and e.status != 200],
        "prompt_tokens": prompts, "tools": announced(last), "called": called(last), "pictures": pictures,
        "pictures_by_question": counts,
        "fields_not_read": sorted(unread),
        "betas": sorted({beta for h in headers for beta in h.get("anthropic-beta", "").split(",") if beta}),
        "agents": sorted({h.get("user-agent", "") for h in headers}),
    }  # fmt: skip


def arrived(served: Served, prepared: Prepared, n: int, file: bytes, picture: pathlib.Path) -> dict[str, Any]:
    """Whether the n-th picture of a question is the one that was asked about, and in the prompt."""
    one, other = load_image(file), load_image(picture)
    same = one.size == other.size and not np.any(np.asarray(one) != np.asarray(other))
    shown = prepared.prompt.pictures[n]
    kept = image_hash(*served.answers.model.patcher(one))
    return {"sha256": hashlib.sha256(file).hexdigest(), "same_bytes": file == picture.read_bytes(), "same_pixels": same,
            "in_prompt": image_hash(shown.patches, shown.yx) == kept}  # fmt: skip


def understood(served: Served, exchange: Exchange) -> tuple[Prepared, set[str]]:
    """What was asked, read once more, and the names of fields that nobody looked at."""
    form, unread = FORMS[exchange.path], set()
    body = watched(exchange.body, unread)
    for name in ("model", "stream", "n"):  # the routes read these
        body.get(name)
    prepared = asyncio.run(served.answers.prepare(form.asked(body, served.answers.limits)))
    form.Reply(NAME, body, prepared, served.answers.model.tokenizer)
    return prepared, unread


class _Watched(dict):
    """An object of a body; a field that is looked at is taken off the list."""

    def __init__(self, found: Mapping[str, Any], path: str, unread: set[str]) -> None:
        inner = {k: v if k in _OPAQUE else watched(v, unread, f"{path}{k}") for k, v in found.items()}
        super().__init__(inner)
        self._path, self._unread = path, unread
        unread.update(f"{path}{k}" for k in found)

    def _look(self, names: Sequence[str]) -> None:
        self._unread -= {self._path + name for name in names}

    def get(self, name: str, default: Any = None) -> Any:
        self._look([name])
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self._look([name])
        return super().__getitem__(name)

    def items(self):
        self._look(list(self))
        return super().items()


def watched(value: Any, unread: set[str], path: str = "") -> Any:
    """The same JSON, which names its fields in `unread` until they are looked at."""
    if isinstance(value, dict):
        return _Watched(value, path and f"{path}.", unread)
    return [watched(inner, unread, f"{path}[]") for inner in value] if isinstance(value, list) else value


def files(value: Any) -> Iterator[bytes]:
    """The files of all images in a body, in reading order."""
    if isinstance(value, list):
        for inner in value:
            yield from files(inner)
    elif isinstance(value, dict):
        if value.get("type") == "image" and "data" in value.get("source", {}):
            yield base64.b64decode(value["source"]["data"])
        elif value.get("type") == "image_url":
            yield base64.b64decode(value["image_url"]["url"].partition(",")[2])
        else:
            for inner in value.values():
                yield from files(inner)


def announced(body: Mapping[str, Any]) -> list[str]:
    """Names of the tools that may be called."""
    return [tool["function"]["name"] if "function" in tool else tool["name"] for tool in body.get("tools", [])]


def called(body: Mapping[str, Any]) -> list[str]:
    """Names of the tools that the turns of the assistant called."""
    names = []
    for message in body["messages"]:
        blocks = message["content"] if isinstance(message.get("content"), list) else []
        names += [block["name"] for block in blocks if block.get("type") == "tool_use"]
        names += [call["function"]["name"] for call in message.get("tool_calls") or []]
    return names
