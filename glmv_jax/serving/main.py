"""The process: it listens, says where, and on SIGTERM ends when the answers that run are done."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import signal
from collections.abc import Callable, Iterator

import uvicorn

from glmv_jax.inference.front import Front
from glmv_jax.serving.answers import Answers, Model
from glmv_jax.serving.app import Server
from glmv_jax.serving.connection import Connection
from glmv_jax.serving.limits import WRITING, Limits
from glmv_jax.serving.metrics import Metrics
from glmv_jax.serving.weights import Weights
from glmv_jax.typing import UserError


class Listener(uvicorn.Server):
    """uvicorn, with signals left to us: its own end the process with the signal's status."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listener(server: Server, host: str, port: int) -> Listener:
    """What serves it; `started` and `servers` as uvicorn has them. port: 0 for any."""
    limits = server.answers.limits
    config = uvicorn.Config(
        server.app(), host, port, log_level="warning", access_log=False, lifespan="off", loop="asyncio", ws="none",
        http=functools.partial(Connection, limits=lambda: server.answers.limits),  # type: ignore[arg-type]
        timeout_graceful_shutdown=math.ceil(limits.drain + WRITING),
        limit_concurrency=limits.connections + 1,  # it refuses from that many on, the one that asks among them
        timeout_keep_alive=limits.keep_alive,  # type: ignore[arg-type]  # handed on to a timer of asyncio
        h11_max_incomplete_event_size=limits.head,
    )  # fmt: skip
    return Listener(config)


async def serve(
    front: Front,
    model: Model,
    names: list[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str = "",
    limits: Limits = Limits(),  # noqa: B008
    weights: Weights | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serves until SIGTERM or SIGINT; then nobody new is let in and those that run end, within `limits.drain` seconds,
    with what they have by then.

    say: told the address, once it is open, then the page's. Raises UserError when it cannot listen there.
    """
    answers = Answers(front, model, limits, Metrics())
    listening = listener(Server(answers, names, key, weights), host, port)

    def end() -> None:
        answers.drain()
        listening.should_exit = True

    loop = asyncio.get_running_loop()
    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, end)
    task = asyncio.ensure_future(_listen(listening, host, port))
    while not (listening.started or task.done()):
        await asyncio.sleep(0.01)
    if not task.done():
        open_port = listening.servers[0].sockets[0].getsockname()[1]
        say(f"{', '.join(names)} at http://{host}:{open_port}/v1")
        say(f"a page to talk to it: http://{host}:{open_port}/")
    await task


async def _listen(listening: Listener, host: str, port: int) -> None:
    try:
        await listening.serve()
    except SystemExit:  # how uvicorn says that it cannot listen
        raise UserError(f"cannot listen at {host}:{port}; choose another --port or --host") from None
