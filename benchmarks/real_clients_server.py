"""A server of ours that keeps what it was asked and what it said, for `real_clients.py`.

Its model is a trained one, or one that can be told what to say before each answer: that of the server's tests
(`tests/serving/parrot.py`), of which no token may come twice in an answer. So text is spelled here with pieces of the
vocabulary that differ, which there are enough of: a letter is a piece, a byte, and a part of longer pieces.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front
from glmv_jax.inference.settings import Settings
from glmv_jax.serving.answers import Answers
from glmv_jax.serving.app import Server
from glmv_jax.serving.limits import Limits
from glmv_jax.serving.main import listener
from glmv_jax.serving.metrics import Metrics

NAME, KEY = "glmv-jax", "open-sesame"
ASKED = "/v1/messages", "/v1/chat/completions"


@dataclasses.dataclass
class Exchange:
    """A request and its reply. body: of JSON, None for none.   status: 0 until the reply begins."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: Any
    status: int = 0
    reply: str = ""

    @property
    def asks(self) -> bool:
        """Whether it wants an answer of the model."""
        return self.path in ASKED and self.method == "POST"


class Recorder:
    """An ASGI application around another. before: awaited before a request is handed on, one at a time."""

    def __init__(self, app: Any, before: Callable[[Exchange], Awaitable[None]]) -> None:
        self._app, self._before, self._one = app, before, asyncio.Lock()
        self.exchanges: list[Exchange] = []

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        exchange = Exchange(scope["method"], scope["path"], scope["query_string"].decode(), headers, _parsed(body))
        self.exchanges.append(exchange)
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Any:
            return next(given, None) or await receive()

        async def told(message: Any) -> None:
            exchange.status = message.get("status", exchange.status)
            exchange.reply += message.get("body", b"").decode(errors="replace")
            await send(message)

        async with self._one:
            await self._before(exchange)
            await self._app(scope, again, told)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


class _Recorded(Server):
    before: Callable[[Exchange], Awaitable[None]]

    def app(self) -> Any:
        self.recorder = Recorder(super().app(), self.before)
        return self.recorder


class Served:
    """A model behind our server in threads of this process. script: (an exchange) -> ids to say, thinking first and
    `</think>` in between, for a model that can be told; None for one that answers by itself."""

    def __init__(self, cfg: Any, params: Any, model: Any, settings: Settings, limits: Limits,
                 script: Callable[[Exchange], Sequence[int]] | None = None) -> None:  # fmt: skip
        engine = Engine(cfg, params, model.sampling(limits.tokens), settings)
        engine.warm()
        self._script = script
        self._front = Front(engine)
        self.answers = Answers(self._front, model, limits, Metrics())
        server = _Recorded(self.answers, [NAME], KEY)
        server.before = self._before
        self._listener = listener(server, "127.0.0.1", 0)
        self._thread = threading.Thread(target=self._listener.run)
        self._thread.start()
        while not self._listener.started:
            self._thread.join(0.01)
        self.exchanges = server.recorder.exchanges
        self.url = f"http://127.0.0.1:{self._listener.servers[0].sockets[0].getsockname()[1]}"

    async def _before(self, exchange: Exchange) -> None:
        if self._script is None or not exchange.asks:
            return
        from tests.serving import parrot

        params = parrot.params(self._script(exchange), [parrot.TAGS["<think>"]])
        await asyncio.wrap_future(self._front.set_params(params, self._front.engine.version + 1))

    def close(self) -> None:
        self._listener.should_exit = True
        self._thread.join()
        self._front.close()


@contextlib.contextmanager
def serving(*args: Any, **settings: Any) -> Iterator[Served]:
    served = Served(*args, **settings)
    try:
        yield served
    finally:
        served.close()


# --- what is said -----------------------------------------------------------------------------------------------------


def spelled(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Ids of special tokens and text, none of them twice. ValueError where there are not enough pieces."""
    known: dict[str, list[int]] = {}
    for i in range(tokenizer.vocab_size):
        if not tokenizer._model.is_control(i) and (text := _text(tokenizer._model.id_to_piece(i))):
            known.setdefault(text, []).append(i)
    found: list[int] = []
    for piece in pieces:
        if piece in tokenizer.special:
            found.append(tokenizer.special[piece])
        elif (more := _spelled(piece, known, frozenset(found))) is None:
            raise ValueError(f"{piece!r} cannot be spelled without a token twice; choose other words")
        else:
            found += more
    return found


def _text(piece: str) -> str:
    byte = piece.startswith("<0x") and chr(int(piece[3:5], 16))
    return (byte if ord(byte) < 128 else "") if byte else piece.replace("\u2581", " ")


def _spelled(text: str, known: Mapping[str, list[int]], used: frozenset[int]) -> list[int] | None:
    if not text:
        return []
    for n in range(len(text), 0, -1):
        for i in known.get(text[:n], ()):
            if i not in used and (rest := _spelled(text[n:], known, used | {i})) is not None:
                return [i, *rest]
    return None
