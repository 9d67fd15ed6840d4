"""A worker of `pool.Pool`: builds functions by name, then answers one call after the other until its socket closes.

It is a fresh interpreter, not a copy of the trainer: it imports neither jax nor the program that started it, and so
holds no device, no lock and no second copy of the weights.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_HEAD = struct.Struct("<Q")
MAX_REPLY = 64 * 2**20  # bytes


class Spec(NamedTuple):
    """A function that a worker builds: what `maker` ("module:attribute") returns for the keyword arguments in `args`.

    args is their JSON text, so that a spec can be compared, hashed and sent.
    """

    maker: str
    args: str

    @classmethod
    def of(cls, maker: str, **args: Any) -> Spec:
        return cls(maker, json.dumps(args, sort_keys=True))


def attribute(path: str) -> Any:
    """The object at "package.module:name.name"."""
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def send(connection: socket.socket, message: Any, deadline: float | None = None) -> None:
    """Sends one message; TimeoutError when the other side has not taken it by `deadline` (of `time.monotonic`)."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    connection.settimeout(_left(deadline))
    connection.sendall(_HEAD.pack(len(data)) + data)


def receive(connection: socket.socket, deadline: float | None = None) -> Any:
    """One message; EOFError when the other side has closed, TimeoutError when it is not there by `deadline`."""
    (size,) = _HEAD.unpack(_read(connection, _HEAD.size, deadline))
    return pickle.loads(_read(connection, size, deadline))


def _read(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        connection.settimeout(_left(deadline))
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other side has closed")
        view = view[count:]
    return data


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def main(fd: int, lifeline: int) -> None:
    """Serves the socket with the descriptor `fd`; the pipe `lifeline` closes when the process that holds it ends."""
    if os.fork() == 0:
        _keep(fd, lifeline)
    os.close(lifeline)
    connection = socket.socket(fileno=fd)
    memory, specs = receive(connection)
    if memory and sys.platform == "linux":  # of data, not of addresses: browsers reserve far more than they use
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    functions: dict[Spec, Callable[..., Any]] = {}
    try:
        for spec in specs:
            functions[spec] = attribute(spec.maker)(**json.loads(spec.args))
    except BaseException as error:
        send(connection, (False, f"{spec.maker} {spec.args}: {_told(error)}", True))
        return
    send(connection, (True, None, False))
    while True:
        try:
            spec, args = receive(connection)
        except EOFError:
            return
        send(connection, _answer(functions[spec], args))


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any, bool]:
    """(whether it returned, the result or what it raised, whether this worker should end)."""
    try:
        result = function(*args)
        if (size := len(pickle.dumps(result))) > MAX_REPLY:
            raise ValueError(f"a result of {size} bytes is larger than {MAX_REPLY}")
        return True, result, False
    except BaseException as error:  # SystemExit too: a rule does not end the worker by calling exit()
        # What filled the memory may still be held somewhere: a fresh worker is better.
        return False, _told(error), isinstance(error, MemoryError)


def _told(error: BaseException) -> str:
    """An exception in at most 300 characters; one whose text cannot be made is told by its name."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return type(error).__name__


def _keep(fd: int, lifeline: int) -> None:
    """A process beside the worker that ends it, and all that its rules have started, once the pool's process is gone.

    The worker itself may be in the middle of a call that never lets go of the interpreter.
    """
    os.close(fd)
    while os.read(lifeline, 1):  # returns nothing, at the end
        pass
    os.killpg(0, signal.SIGKILL)
