"""The work directory of a run, before it is trained in: whose it is, and that one process at a time is in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator

from glmv_jax.typing import UserError


def check(workdir: str, stage: str) -> None:
    """Raises UserError for a work directory that is a file, or that holds a run of another stage."""
    if os.path.lexists(workdir) and not os.path.isdir(workdir):
        raise UserError(f"--workdir {workdir} is a file; give a folder")
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file).get("stage")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or give another --workdir") from None
    if before != stage:
        raise UserError(
            f"--workdir {workdir} holds a run of stage {before!r}, but the config is of stage {stage!r}; "
            "give another --workdir"
        )


@contextlib.contextmanager
def alone_in(workdir: str) -> Iterator[None]:
    """Holds the work directory's lock; waits while another process (say, of a killed quickstart) is training there.

    The lock is a record lock: it ends with its process, however that dies, and worker processes do not inherit it.
    """
    with open(os.path.join(workdir, ".lock"), "a+", encoding="ascii") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "?"
            print(f"waiting: process {holder} is training in {workdir} (Ctrl-C to give up)", flush=True)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
