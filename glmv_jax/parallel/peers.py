"""The processes of a run notice when one of them has ended: without it the others wait in the next collective for ever,
or until JAX aborts them with a page of addresses that names nobody.

JAX aborts a process the moment that process 0 has ended, so the one that says so is another program, `guard`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from glmv_jax.parallel import guard
from glmv_jax.typing import UserError

EXIT = 3  # code of a process that ends because another one has
GRACE = 3.0  # seconds that it has to say what it was about to say itself
_KEY = "glmv/guard"  # in the store of JAX's coordinator: where the guard of process 0 waits


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """A block that all processes of this run have to leave together; nothing is done for one process.

    When another one ends before that, standard error is told which, and this one ends with EXIT (or by JAX's abort):
    from a thread, as JAX may be waiting where no exception reaches it, or from here, when what JAX waited for was
    broken off. When the block raises, the others are told.
    """
    from jax._src.distributed import global_state as known  # the store has no public name

    if known.client is None or known.num_processes == 1:
        yield
        return
    watch = _Watch(known.process_id, known.num_processes, known.coordinator_address or "", known.client)
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        watch.fail(2 if isinstance(error, UserError) else 130)
        raise
    except SystemExit as error:  # asked to stop, as all are
        watch.fail(int(error.code)) if error.code else watch.leave()
        raise
    except BaseException as error:
        if watch.gone.wait(GRACE):
            said = (str(error).splitlines() or [""])[0][:200]
            print(f"glmv: so this was broken off here: {type(error).__name__}: {said}", file=sys.stderr, flush=True)
            os._exit(EXIT)
        watch.fail(1)
        raise
    watch.leave()


class _Watch:
    """A process and its guard.   gone: set when another process has ended."""

    def __init__(self, mine: int, count: int, address: str, store: Any) -> None:
        self.gone, self._left = threading.Event(), threading.Event()
        where = []
        if mine:
            host = address.rpartition(":")[0].strip("[]")
            where = [host, *store.blocking_key_value_get(_KEY, 60_000).split()]
        words = [str(number) for number in (os.getpid(), mine, count)]
        started: Any = subprocess.Popen(  # Any: its pipes are there
            [sys.executable, "-I", "-S", guard.__file__, *words, *where],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._guard = started
        said = started.stdout.readline().strip()
        if not said:
            raise RuntimeError(f"{guard.__file__} did not start; its own words are above")
        if not mine:
            store.key_value_set(_KEY, said)
        threading.Thread(target=self._listen, daemon=True, name="peers").start()

    def leave(self) -> None:
        """The others are needed no longer."""
        self._left.set()
        with contextlib.suppress(BrokenPipeError):  # another one has ended just now
            print("done", file=self._guard.stdin, flush=True)

    def fail(self, code: int) -> None:
        """This process ends before the run does, with this exit code: not through JAX, which would wait for the others
        first and put a page of words behind ours."""
        self._left.set()
        self._guard.stdin.close()
        atexit.register(_at_once, code)

    def _listen(self) -> None:
        if self._guard.stdout.readline() == "gone\n":
            self.gone.set()
            if not self._left.wait(GRACE):
                os._exit(EXIT)


def _at_once(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
