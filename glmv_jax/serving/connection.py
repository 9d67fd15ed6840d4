"""A connection that gives up on who sends too slowly or without end, of which uvicorn knows nothing.

uvicorn itself limits the number of connections, the size of heads and the time between requests; the time of a body is
limited where it is read (`app.Server`), which can say so in the format that was asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from glmv_jax.serving import openai
from glmv_jax.serving.limits import Limits, Refused


class Connection(H11Protocol):
    """limits: what counts now; `Limits.reading` of it is the time for a head, and for what is left of a body that was
    answered before it had come. A head that comes too slowly is answered by 408, one that is too long by 431; who has
    sent nothing at all is hung up on.
    """

    def __init__(self, *args: Any, limits: Callable[[], Limits], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start(self._too_slow)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._stop()
            self._start(self.transport.close)
        else:
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As uvicorn does it, but for a head that is too long."""
        if len(self.conn.trailing_data[0]) > (most := self._limits().head):
            self._refuse(Refused(f"the head of a request has more than {most} bytes; send fewer headers", 431))
        else:
            super().send_400_response(msg)

    def _look(self) -> None:
        """Whether a head is on its way: its time runs from its first byte, that of the first one from the opening."""
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._start(self._too_slow)
        elif self.conn.their_state is not h11.SEND_BODY or self.cycle is None or not self.cycle.response_complete:
            self._stop()

    def _start(self, then: Callable[[], None]) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._limits().reading, then)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if self.conn.trailing_data[0]:
            seconds = self._limits().reading
            self._refuse(Refused(f"the head of the request did not come within {seconds:g} s; send it faster", 408))
        else:
            self.transport.close()

    def _refuse(self, refused: Refused) -> None:
        """Answers a request that nobody else has seen, and closes."""
        body = json.dumps(openai.error(refused, refused.status)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=refused.status, headers=headers, reason=STATUS_PHRASES[refused.status])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
