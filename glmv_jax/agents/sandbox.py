"""Runs a function that a model wrote, on inputs, in a process that can do nothing else. Linux only.

The program never meets what it is judged by: it is given inputs, hands back JSON, and the caller compares. It runs in
namespaces of its own without network, other processes or files (its root is an empty read-only folder), as nobody and
without capabilities, with limits on CPU time, memory, open files, written files and processes (none). A process of ours
outside, which it cannot see, kills it when its time is over, also when the caller is no more.

Modules must be loaded before the doors close: MODULES are, others are not found.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from glmv_jax.typing import UserError

MODULES = ("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq",
           "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing")  # fmt: skip
NOBODY = 65534  # the user that a superuser's programs run as
MOST_OUTPUT = 1 << 18  # bytes of all results together
WALL = 4.0  # wall time over CPU time, as machines are shared
_START = 5.0  # seconds that a loaded machine may need to start an interpreter


class Result(NamedTuple):
    """values: what the function returned for each input, as JSON text; shorter than the inputs when it was ended early.
    An input on which it raised gives "". reason: "" or why there are fewer: "time", "output", "died", "program"."""

    values: tuple[str, ...]
    reason: str


def run(
    program: str, entry: str, inputs: Sequence[Sequence[Any]], *, seconds: float = 1.0, memory: int = 256 << 20
) -> Result:
    """Calls `entry` of a Python program with each of the inputs (JSON-able arguments), in order, in one process.

    seconds: of CPU time for all of it, which the kernel counts in whole ones; WALL times as much of wall time.
    memory: bytes of address space. Whatever the program does is in the result.
    Raises UserError where there are no namespaces to run it in.
    """
    if reason := missing():
        raise UserError(reason)
    return _run(program, entry, inputs, seconds, memory)


@functools.cache
def missing() -> str:
    """Why programs cannot be run here, "" when they can."""
    if sys.platform != "linux":
        return "programs of a model are run in Linux namespaces; this is no Linux: run the task in a container"
    trial = _run("def f(x): return x", "f", [[1]], 10.0, 256 << 20)
    if trial == Result(("1",), ""):
        return ""
    return (
        f"programs of a model are run in namespaces of their own, and this machine gives none ({trial.reason}); "
        "allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone), give the container "
        "CAP_SYS_ADMIN, or leave the task out"
    )


def _run(program: str, entry: str, inputs: Sequence[Sequence[Any]], seconds: float, memory: int) -> Result:
    job = {"program": program, "entry": entry, "inputs": list(inputs), "modules": MODULES,
           "seconds": seconds, "wall": WALL * seconds, "memory": memory, "uid": NOBODY}  # fmt: skip
    # A file and no pipe: whatever reads it late or not at all, nothing here waits for it.
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(job).encode())
        given.seek(0)
        keeper: Any = subprocess.Popen(  # Any: its pipe is there
            [sys.executable, "-I", "-S", "-B", os.path.join(os.path.dirname(__file__), "jail.py")],
            stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=True, cwd="/",
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        )  # fmt: skip
    try:
        data, whole = _read(keeper.stdout.fileno(), time.monotonic() + WALL * seconds + _START)
    finally:
        keeper.terminate()  # it kills the program first
        keeper.stdout.close()
        try:
            keeper.wait(_START)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
    return _result(data, whole, len(inputs))


def _read(pipe: int, deadline: float) -> tuple[bytes, str]:
    """(what came, "" or why no more was read)."""
    data = b""
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if not ready.poll(1000 * left):
            break
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return data, ""
        data += chunk
        if len(data) > MOST_OUTPUT:
            return data, "output"
    return data, "time"


def _result(data: bytes, cut: str, expected: int) -> Result:
    """Results are lines, one an input, "=" and JSON or "!"; the keeper's last line says how the program ended."""
    *lines, _ = data.decode("utf-8", "replace").split("\n")
    ended = lines.pop()[1:] if lines and lines[-1].startswith("#") else "died"
    values = tuple(line[1:] for line in lines[:expected] if line[:1] in ("=", "!"))
    if len(values) == expected and len(lines) == expected:
        return Result(values, "")
    return Result(values, cut or ended or "program")
