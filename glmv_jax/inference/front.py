"""An engine in a thread of its own, for asyncio: `completion = await front.complete(request)`.

What callers ask is put in a box that the thread empties between two calls of the engine, so nobody waits for a call to
end, and any thread and any event loop may ask. When the engine's queue is full, `complete` waits for room.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from glmv_jax.inference.engine import Engine
from glmv_jax.inference.requests import Completion, Likely, Request
from glmv_jax.typing import Params, UserError

OnTokens = Callable[[np.ndarray, np.ndarray, Likely | None], None]


class Piece(NamedTuple):
    """Some more tokens of an answer, their log-probabilities, the version of the parameters that drew them, and the
    likeliest tokens where the request asks for them."""

    tokens: np.ndarray
    logprobs: np.ndarray
    version: int
    likely: Likely | None = None


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request that was handed in. done: its completion, or what was raised."""

    request: Request
    on_tokens: OnTokens | None
    done: Future
    front: Front
    id: int | None = None  # in the engine

    def abort(self) -> None:
        """Has it end soon, from any thread: `done` is what it had so far, or the whole if that came first."""
        self.front.ask(lambda: self.front.abort(self))

    async def answer(self) -> Completion:
        """What `done` will be. Cancelled, the request is aborted."""
        try:
            return await asyncio.wrap_future(self.done)
        except asyncio.CancelledError:
            self.abort()
            raise


class Front:
    """The thread of one engine; a context manager that ends it. Nobody else may call the engine meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._box: collections.deque[tuple[Callable[[], Any], Future]] = collections.deque()
        self._patient: collections.deque[Ticket] = collections.deque()  # wait for room in the engine's queue
        self._running: set[Ticket] = set()
        self._ring = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # --- for callers --------------------------------------------------------------------------------------------------

    async def complete(self, request: Request, *, wait: bool = True) -> Completion:
        """The answer, when it is done. Cancelled, the request is aborted.

        wait: for room in the queue, else Busy is raised.
        Raises UserError as `Engine.submit`, and whatever ended the engine.
        """
        return await self.submit(request, wait=wait).answer()

    async def stream(self, request: Request, *, wait: bool = True) -> AsyncGenerator[Piece | Completion, None]:
        """Pieces of the answer as they come, and last of all the whole. Left early, the request is aborted."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        put = lambda x: _in_loop(loop, lambda: queue.put_nowait(x))  # noqa: E731
        piece = lambda tokens, logprobs, likely: put(Piece(tokens, logprobs, self.engine.version, likely))  # noqa: E731
        ticket = self.submit(request, piece, wait)
        ticket.done.add_done_callback(put)
        try:
            while isinstance(piece := await queue.get(), Piece):
                yield piece
            yield piece.result()
        finally:
            if not ticket.done.done():
                ticket.abort()

    def submit(self, request: Request, on_tokens: OnTokens | None = None, wait: bool = True) -> Ticket:
        """Without asyncio. on_tokens: as `Engine.submit`, in the engine's thread."""
        ticket = Ticket(request, on_tokens, _future(), self)
        with self._ring:
            if self._closed:
                ticket.done.set_exception(self._gone())
            elif wait:
                self._patient.append(ticket)
            else:
                self._box.append((lambda: self._submit(ticket), _future()))
            self._ring.notify()
        return ticket

    def set_params(self, params: Params, version: int) -> Future:
        """As `Engine.set_params`, after the call that runs now; done when the engine has its copy."""
        return self.ask(lambda: self.engine.set_params(params, version))

    def ask(self, what: Callable[[], Any]) -> Future:
        """What this returns when the engine's thread calls it, between two steps."""
        answer = _future()
        with self._ring:
            if self._closed:
                answer.set_exception(self._gone())
            else:
                self._box.append((what, answer))
                self._ring.notify()
        return answer

    @property
    def alive(self) -> bool:
        """Whether requests are answered still."""
        return not self._closed

    def close(self) -> None:
        """Ends the thread; requests that are not done raise UserError."""
        with self._ring:
            self._closed = True
            self._ring.notify()
        self._thread.join()

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            more = False
            while True:
                with self._ring:
                    while not (more or self._box or self._patient or self._closed):
                        self._ring.wait()
                    if self._closed:
                        return
                self._answer()
                more = self.engine.step()
        except BaseException as error:  # everybody who waits has to hear of it
            self._error = error
            raise
        finally:
            with self._ring:
                self._closed = True
            for future in (*(answer for _, answer in self._box), *(x.done for x in (*self._patient, *self._running))):
                future.set_exception(self._gone())
            self._running.clear()

    def _answer(self) -> None:
        """What is in the box; then those that wait for room, as long as there is some."""
        while self._box:
            what, answer = self._box.popleft()
            try:
                answer.set_result(what())
            except Exception as error:  # the caller's mistake, or a bug that the caller is to see
                answer.set_exception(error)
        while self._patient and self.engine.waiting < self.engine.settings.queue:
            self._submit(self._patient.popleft())

    def _submit(self, ticket: Ticket) -> None:
        try:
            ticket.id = self.engine.submit(ticket.request, lambda x: self._finish(ticket, x), ticket.on_tokens)
            self._running.add(ticket)
        except UserError as error:
            ticket.done.set_exception(error)

    def abort(self, ticket: Ticket) -> None:
        """Only in the engine's thread; see `Ticket.abort`."""
        if ticket.id is not None:
            self.engine.abort(ticket.id)
        elif ticket in self._patient:
            self._patient.remove(ticket)
            begun = ticket.request.begun or Completion.forced(())
            ticket.done.set_result(dataclasses.replace(begun, reason="aborted"))

    def _finish(self, ticket: Ticket, completion: Completion) -> None:
        if ticket in self._running:
            self._running.remove(ticket)
            ticket.done.set_result(completion)

    def _gone(self) -> BaseException:
        return self._error or UserError("the engine was closed; start another, and ask again what was not done")


def _future() -> Future:
    """One that cannot be cancelled from outside: what the engine will say about it, it may say."""
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future


def _in_loop(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    """In that event loop, unless it is over."""
    try:
        loop.call_soon_threadsafe(what)
    except RuntimeError:
        if not loop.is_closed():
            raise
