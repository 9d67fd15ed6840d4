"""The routes: bodies in, replies and streams out, and the limits on the way."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from glmv_jax.serving import anthropic, completions, fields, openai, openapi, page
from glmv_jax.serving.answers import Answers, Asked, Ended, Part, Prepared
from glmv_jax.serving.limits import RATE, WRITING, Limits, Refused
from glmv_jax.serving.weights import Weights
from glmv_jax.typing import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Reply(Protocol):
    """Makes the bodies of one reply in some wire format; see `openai.Reply`. Chunks are named by `event`."""

    def whole(self, choices: list[list[Part | Ended]]) -> dict[str, Any]: ...
    def first(self) -> list[dict[str, Any]]: ...
    def part(self, n: int, part: Part | Ended) -> list[dict[str, Any]]: ...
    def last(self) -> list[dict[str, Any]]: ...


class Format(NamedTuple):
    """A wire format. event: writes a chunk as an event of a stream; end: what ends one; ping: an event that says
    nothing but that the answer is still to come."""

    asked: Callable[[Mapping[str, Any], Limits], Asked]
    reply: Callable[[str, Mapping[str, Any], Prepared, Any], Reply]
    error: Callable[[Exception, int], dict[str, Any]]
    event: Callable[[Mapping[str, Any]], str]
    end: str = "data: [DONE]\n\n"
    ping: str = ": the answer is on its way\n\n"


def _data(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def _named(chunk: Mapping[str, Any]) -> str:
    return f"event: {chunk['type']}\n{_data(chunk)}"


OPENAI = Format(openai.asked, openai.Reply, openai.error, _data)
ANTHROPIC = Format(anthropic.asked, anthropic.Reply, anthropic.error, _named, "", _named({"type": "ping"}))


class Server:
    """One model's routes.

    names: what the model is called; any of them may be asked for.   key: what who asks has to show; "" for nothing.
    weights: where new ones may come from; None for nowhere. They take a key.
    """

    def __init__(self, answers: Answers, names: Sequence[str], key: str = "", weights: Weights | None = None) -> None:
        if weights is not None and not key:
            raise UserError("a server that takes new weights asks for a key; set GLMV_API_KEY here and for the trainer")
        self.answers, self.names, self._key, self._weights = answers, list(names), key, weights
        self._created = int(time.time())

    def app(self) -> Starlette:
        """As an ASGI application."""
        ids = Format(self._of_ids, completions.Reply, completions.error, _data)
        routes = [
            self._guarded("/v1/chat/completions", self._asking(OPENAI), method="POST"),
            self._guarded("/v1/completions", self._asking(ids), method="POST"),
            self._guarded("/v1/weights", self._take_weights, method="POST"),
            self._guarded("/v1/messages", self._asking(ANTHROPIC), ANTHROPIC, "POST"),
            self._guarded("/v1/messages/count_tokens", self._count_tokens, ANTHROPIC, "POST"),
            self._guarded("/v1/models", self._models),
            self._guarded("/v1/models/{name:path}", self._model),
            Route("/", self._page, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/openapi.json", self._description, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._http_error})

    # --- small ones ---------------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        return page.response()

    async def _health(self, request: Request) -> Response:
        ready = not self.answers.draining and self.answers.front.alive
        return JSONResponse({"status": "ok" if ready else "ending"}, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        text = self.answers.metrics.text(self.answers.front, self.answers.running)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _description(self, request: Request) -> Response:
        return JSONResponse(openapi.description(self.names, self.answers.limits, key=bool(self._key)))

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about(name) for name in self.names]})

    async def _model(self, request: Request) -> Response:
        self._check_name(name := request.path_params["name"])
        return JSONResponse(self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        engine, films = self.answers.front.engine, self.answers.limits.films
        kinds = ["text", *["image"] * (engine.cfg.vision is not None), *["video"] * (films > 0)]
        return {"id": name, "object": "model", "created": self._created, "owned_by": "glmv_jax",
                "max_model_len": engine.settings.length, "input_modalities": kinds}  # fmt: skip

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise Refused(f"there is no model {name!r:.80}; there is {', '.join(self.names)}", 404, field="model")

    async def _http_error(self, request: Request, error: Any) -> Response:  # an HTTPException
        body = openai.error(error, error.status_code)
        body["error"]["message"] = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(body, error.status_code, error.headers)

    async def _count_tokens(self, request: Request) -> Response:
        body = fields.parsed(await self._body(request))
        self._check_name(fields.need(body, "model", str))
        asked = await asyncio.to_thread(anthropic.asked, body, self.answers.limits, counted=True)
        return JSONResponse({"input_tokens": await self.answers.count(asked)})

    async def _take_weights(self, request: Request) -> Response:
        if self._weights is None:
            raise Refused("this server takes no new weights; serve with --weights and the folder they come in", 403)
        return JSONResponse(await self._weights.take(self.answers.front, fields.parsed(await self._body(request))))

    # --- questions ----------------------------------------------------------------------------------------------------

    def _asking(self, form: Format) -> Callable[[Request], Awaitable[Response]]:
        """The route that answers in a wire format."""

        async def route(request: Request) -> Response:
            body = fields.parsed(await self._body(request))
            self._check_name(fields.need(body, "model", str))
            stream = fields.get(body, "stream", bool, False)
            async with contextlib.AsyncExitStack() as room:
                room.enter_context(self.answers.room(max(1, fields.get(body, "n", int, 1)) if form is OPENAI else 1))
                reply, parts = await _unless_left(request, self._begun(form, body, room, stream))
                if stream:
                    limits = self.answers.limits
                    return _Stream(self._events(form, reply, parts), room.pop_all(), form.ping, limits)
                return JSONResponse(await _unless_left(request, self._whole(reply, parts)))

        return route

    def _of_ids(self, body: Mapping[str, Any], limits: Limits) -> Asked:
        engine = self.answers.front.engine
        return completions.asked(body, limits, engine.sampling, engine.cfg.decoder.vocab)

    async def _begun(
        self, form: Format, body: Mapping[str, Any], room: contextlib.AsyncExitStack, stream: bool
    ) -> tuple[Reply, AsyncIterator[Any]]:
        """(reply, its parts), once the first has come, so that an engine's refusal is a status and no event; of a
        stream when it is time for a sign of life."""
        asked = await asyncio.to_thread(form.asked, body, self.answers.limits)
        prepared = await self.answers.prepare(asked)
        reply = form.reply(body["model"], body, prepared, self.answers.model.tokenizer)
        parts = _together([self.answers.answer(prepared, n) for n in range(asked.choices)])
        room.push_async_callback(parts.aclose)
        first = asyncio.ensure_future(anext(parts))
        room.push_async_callback(_cancelled, first)
        await asyncio.wait([first], timeout=self.answers.limits.ping if stream else None)
        if first.done():
            first.result()  # or what it raised
        return reply, _with_first(first, parts)

    async def _whole(self, reply: Reply, parts: AsyncIterator[tuple[int, Part | Ended]]) -> dict[str, Any]:
        choices: dict[int, list[Part | Ended]] = {}
        async for n, part in parts:
            choices.setdefault(n, []).append(part)
        return reply.whole([choices[n] for n in sorted(choices)])

    async def _events(self, form: Format, reply: Reply, parts: AsyncIterator[Any]) -> AsyncIterator[str]:
        try:
            for chunk in reply.first():
                yield form.event(chunk)
            async for n, part in parts:
                for chunk in reply.part(n, part):
                    yield form.event(chunk)
            for chunk in reply.last():
                yield form.event(chunk)
            if form.end:
                yield form.end
        except Exception as error:  # the status has been sent; only an event can say it
            log.error("an answer broke off: %s", error, exc_info=not isinstance(error, UserError))
            yield form.event(form.error(error, getattr(error, "status", 500)))

    async def _body(self, request: Request) -> bytes:
        """The body, no further than the limit, and no longer than it may take."""
        most, found = self.answers.limits.body, bytearray()
        said = request.headers.get("content-length", "0")
        if said.isdecimal() and int(said) > most:
            raise Refused(f"a body of {said} bytes, of {most} that are taken; send smaller images", 413)
        until, seconds = asyncio.get_running_loop().time(), self.answers.limits.reading
        try:
            async with asyncio.timeout_at(until + seconds) as clock:
                async for piece in request.stream():
                    found += piece
                    if len(found) > most:
                        raise Refused(f"a body of more than {most} bytes; send smaller images", 413)
                    clock.reschedule(until + seconds + len(found) / RATE)
        except TimeoutError:
            raise Refused(f"{len(found)} bytes of the body came in {seconds + len(found) / RATE:.0f} s, and no more; "
                          "send it faster", 408) from None  # fmt: skip
        except ClientDisconnect:
            raise _Left from None
        return bytes(found)

    # --- around all ---------------------------------------------------------------------------------------------------

    def _guarded(self, path: str, route: Callable[[Request], Awaitable[Response]], form: Format = OPENAI,
                 method: str = "GET") -> Route:  # fmt: skip
        """The route with the key asked for, errors in the wire format, and a count of its replies."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await route(request)
            except UserError as error:
                status = getattr(error, "status", 400)
                response = JSONResponse(form.error(error, status), status)
                if after := getattr(error, "after", None):
                    response.headers["Retry-After"] = str(after)
                if status == 408:  # the rest of the body is not waited for
                    response.headers["Connection"] = "close"
            except _Left:
                response = Response(status_code=499)  # nobody reads it
            except Exception as error:
                log.exception("%s %s", request.method, request.url.path)
                bug = RuntimeError(f"a bug of the server: {type(error).__name__}")
                response = JSONResponse(form.error(bug, 500), 500)
            self.answers.metrics.replies[path, response.status_code] += 1
            return response

        return Route(path, guarded, methods=[method])

    def _check_key(self, request: Request) -> None:
        if not self._key:
            return
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        shown = bearer.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not hmac.compare_digest(shown.encode(), self._key.encode()):
            raise Refused("this server asks for an API key, and that was none; send it as a Bearer token or x-api-key",
                          401)  # fmt: skip


class _Stream(StreamingResponse):
    """Events as they come, and the ping whenever nothing has for `Limits.ping` seconds. room: what is let go of when
    they end, also when they never begin, or when they are over and nobody reads them."""

    def __init__(self, events: AsyncIterator[str], room: contextlib.AsyncExitStack, ping: str, limits: Limits) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._room, self._ping, self._seconds, self._most = room, ping.encode(), limits.ping, limits.seconds + WRITING

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._room:
            try:
                async with asyncio.timeout(self._most):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                log.warning("a stream is cut off, as nobody reads it")

    async def stream_response(self, send: Send) -> None:
        clock, one = asyncio.get_running_loop().time, asyncio.Lock()  # nothing comes between what is being sent
        last = clock()

        async def noted(message: Message) -> None:
            nonlocal last
            async with one:
                await send(message)
                last = clock()

        async def ping() -> None:
            while True:
                await asyncio.sleep(max(last + self._seconds - clock(), self._seconds / 8))
                if not one.locked() and clock() >= last + self._seconds:
                    await noted({"type": "http.response.body", "body": self._ping, "more_body": True})

        pings = asyncio.ensure_future(ping())
        try:
            await super().stream_response(noted)
        finally:
            await _cancelled(pings)


class _Left(Exception):
    """Whoever asked has closed the connection."""


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result, unless the client leaves before: then the work is cancelled. Raises _Left."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Left
        return task.result()
    finally:
        for each in (task, gone):
            await _cancelled(each)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _cancelled(task: asyncio.Future) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _with_first(first: Awaitable[T], rest: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    yield await first
    async for each in rest:
        yield each


async def _together(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What several streams give, as it comes, with the stream's number. The first error ends all."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as stream:
            async for each in stream:
                yield 0, each
        return
    queue: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue()

    async def drain(n: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for each in stream:
                    queue.put_nowait((n, each))
            queue.put_nowait((n, None))
        except Exception as error:
            queue.put_nowait((n, error))

    tasks = [asyncio.ensure_future(drain(n, stream)) for n, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            n, each = await queue.get()
            if isinstance(each, Exception):
                raise each
            left -= each is None
            if each is not None:
                yield n, each
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
