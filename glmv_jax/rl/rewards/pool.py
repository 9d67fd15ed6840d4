"""Processes that run rules and can be killed: a call that hangs, crashes or fills the memory costs one answer.

A time limit inside a process does not hold: a comparison of huge powers never returns to the interpreter, so that
signals, and threads that watch, come too late (Math-Verify, issue 65). Here the parent waits at a socket and kills.
Workers live for many calls and build their functions before the first, so that imports are paid once; one that was
killed is replaced while the others go on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from glmv_jax.rl.rewards.worker import Spec, receive, send
from glmv_jax.typing import UserError

log = logging.getLogger(__name__)

START_LIMIT = 120.0  # seconds: imports from a cold disk on a busy machine
STARTS = 3  # tries before a worker is given up
_COMMAND = "import sys; from glmv_jax.rl.rewards.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
# A worker is one thread of one core, and whatever a rule imports, it takes no accelerator from the trainer.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


class RuleError(Exception):
    """The function raised, its result could not be sent, or its process died."""


class Pool:
    """`workers` processes for the functions of `specs`. Use it in a `with`, or call `close`.

    memory: bytes of data a worker may hold (on Linux); a rule that wants more gets a MemoryError.
    The processes start at once and in parallel; nothing waits for them but the first calls. They end with `close`, with
    the garbage collection of the pool, or with this process, however that one ends.
    """

    def __init__(self, specs: Iterable[Spec], *, workers: int, memory: int | None = None):
        if workers < 1:
            raise UserError(f"rules run in workers, but workers={workers}: set it to 1 or more")
        self._state = _State(tuple(dict.fromkeys(specs)), workers, memory)
        threads = [threading.Thread(target=_serve, args=(self._state,), daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._state, threads)

    def submit(self, spec: Spec, *args: Any, limit: float) -> concurrent.futures.Future:
        """Calls a function in a worker; the future has its result.

        limit: seconds from when a worker takes the call; waiting for a free worker does not count.
        The future raises TimeoutError when the worker had to be killed, RuleError when the call failed, UserError when
        no worker can be started, and is cancelled when the pool is closed first.
        """
        if spec not in self._state.specs:
            raise ValueError(f"{spec} is none of the pool's functions")
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._state.calls.put(_Call(spec, args, limit, future))
        if self._state.closed.is_set():
            future.cancel()
        return future

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [process.pid for process in tuple(self._state.processes)]

    def close(self) -> None:
        """Kills the workers, in the middle of their calls too, and cancels the calls that wait."""
        self._finalizer()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Call(NamedTuple):
    spec: Spec
    args: tuple[Any, ...]
    limit: float
    future: concurrent.futures.Future


@dataclasses.dataclass
class _State:
    """What the threads share; they hold no reference to the pool, so that it can be collected."""

    specs: tuple[Spec, ...]
    workers: int
    memory: int | None
    calls: queue.SimpleQueue[_Call | None] = dataclasses.field(default_factory=queue.SimpleQueue)
    processes: set[_Process] = dataclasses.field(default_factory=set)
    closed: threading.Event = dataclasses.field(default_factory=threading.Event)
    broken: list[str] = dataclasses.field(default_factory=list)


class _Process:
    """One worker, and the process that keeps it (`worker._keep`)."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(), lifeline),
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the parent, and what a rule has started dies with the rule
            )  # fmt: skip
        os.close(lifeline)
        self.pid = self._process.pid
        self._lock = threading.Lock()

    def wait(self, specs: tuple[Spec, ...], memory: int | None) -> None:
        """Returns when all functions are built; UserError says which could not be, RuleError that it died or hung."""
        deadline = time.monotonic() + START_LIMIT
        try:
            send(self._connection, (memory, specs), deadline)
            ready, reason, _ = receive(self._connection, deadline)
        except (OSError, EOFError) as error:
            raise RuleError(f"it died or hung ({type(error).__name__})") from None
        if not ready:
            raise UserError(reason)

    def call(self, spec: Spec, args: tuple[Any, ...], limit: float) -> tuple[bool, Any, bool]:
        """(whether it returned, the result or what it raised, whether the worker ends)."""
        deadline = time.monotonic() + limit
        send(self._connection, (spec, args), deadline)
        return receive(self._connection, deadline)

    def alive(self) -> bool:
        """False once the other end is closed; an idle worker never speaks first."""
        self._connection.setblocking(False)
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def kill(self) -> None:
        """Ends the worker and all that it has started; from any thread, any number of times."""
        with self._lock:
            if self._process.returncode is None:  # not waited for yet, so that its number is no one else's
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()
                self._connection.close()
                os.close(self._lifeline)


def _serve(state: _State) -> None:
    """The thread of one worker: keeps a process up and hands it one call after the other."""
    process = None
    while True:
        if process is None:
            process = _start(state)
            if process is None and 0 < len(state.broken) < state.workers:
                return  # the workers that are left do it
        call = state.calls.get()
        if call is None:
            break
        if not call.future.set_running_or_notify_cancel():
            continue
        if process is not None and not process.alive():  # it died between two calls: not the fault of this one
            _end(state, process)
            process = _start(state)
        if process is None:
            call.future.set_exception(UserError(f"no reward worker starts: {state.broken[0]}"))
            continue
        outcome, last = _outcome(process, call)
        if last:
            _end(state, process)
            process = None
        if isinstance(outcome, BaseException):
            call.future.set_exception(outcome)
        else:
            call.future.set_result(outcome)
    if process is not None:
        _end(state, process)


def _outcome(process: _Process, call: _Call) -> tuple[Any, bool]:
    """What a call returned, or the exception for its future; and whether the worker is of no more use."""
    try:
        returned, result, last = process.call(call.spec, call.args, call.limit)
    except TimeoutError:
        return TimeoutError(f"{call.limit} s are over"), True
    except Exception as error:
        return RuleError(f"the worker died ({type(error).__name__})"), True
    return (result if returned else RuleError(result)), last


def _start(state: _State) -> _Process | None:
    """A worker with its functions built; None when the pool is closed, or when it cannot be had (then `broken`)."""
    tries = 0
    while True:
        tries += 1
        process = _Process()
        state.processes.add(process)
        try:
            process.wait(state.specs, state.memory)
            failed = None
        except (RuleError, UserError) as error:
            failed = error
        if failed is None and not state.closed.is_set():
            return process
        _end(state, process)
        if state.closed.is_set():
            return None
        log.warning("a reward worker did not start: %s", failed)
        if tries == STARTS or isinstance(failed, UserError):
            state.broken.append(str(failed))
            return None


def _end(state: _State, process: _Process) -> None:
    process.kill()
    state.processes.discard(process)


def _stop(state: _State, threads: list[threading.Thread]) -> None:
    state.closed.set()
    with contextlib.suppress(queue.Empty):
        while True:
            if (call := state.calls.get_nowait()) is not None:
                call.future.cancel()
    for _ in threads:
        state.calls.put(None)
    while any(thread.is_alive() for thread in threads):
        for process in tuple(state.processes):  # again and again: one may just be starting
            process.kill()
        for thread in threads:
            thread.join(0.05)
