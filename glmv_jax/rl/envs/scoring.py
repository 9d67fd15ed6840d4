"""The process in which reasoning-gym's graders run, and how it is asked. A grader may raise, hang, or (some of them
call `eval` on the answer) do whatever the answer says: none of that reaches the process that trains.

Run as a file, alone, this is that process: it imports reasoning_gym and nothing of glmv_jax, reads pickled questions
from the one that started it, and writes one line of JSON each: a number, or what was raised. It may use a bounded
amount of memory, has no standard output of its own, and is killed when it takes too long. That is not a sandbox
against an attacker, who would find files and network.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

MEMORY = 2 << 30  # bytes of address space


class Scorer:
    """Asks such a process, one question at a time; starts it with the first question and after it was killed.

    seconds: for a question; starting: for the imports before the first one.
    """

    def __init__(self, seconds: float = 5.0, starting: float = 120.0):
        self.seconds, self.starting = seconds, starting
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def __call__(self, name: str, config: dict[str, Any], entry: dict[str, Any], answer: str) -> tuple[float, str]:
        """(`score_answer` of a data set, ""), or (0.0, what went wrong)."""
        with self._lock:
            if self._process is None:
                self._start()
            try:
                pickle.dump((name, config, entry, answer), self._process.stdin)
                self._process.stdin.flush()
                said = json.loads(self._line(self.seconds))
            except (OSError, ValueError) as error:  # TimeoutError is an OSError; ValueError: it wrote no JSON
                self.close()
                return 0.0, f"{type(error).__name__}: {error}"
        if isinstance(said, (int, float)) and 0 <= said <= 1:
            return float(said), ""
        return 0.0, str(said)[:300]

    def close(self) -> None:
        """Kills the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _start(self) -> None:
        # -I: nothing of this folder, whose names are those of other packages, can be imported there.
        command = [sys.executable, "-I", __file__]
        with tempfile.TemporaryDirectory() as folder:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)
            try:
                self._line(self.starting)
            except OSError:
                self.close()
                raise

    def _line(self, seconds: float) -> bytes:
        """The process' next line. TimeoutError when it does not come in time, OSError when it never will."""
        line, end = b"", time.monotonic() + seconds
        out = self._process.stdout.fileno()
        while not line.endswith(b"\n"):
            if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no score within {seconds:g} s")
            more = os.read(out, 1 << 16)
            if not more:
                raise OSError("the grader's process ended")
            line += more
        return line


def serve() -> None:
    """The process' own loop."""
    import resource

    # Not as standard input and output, which an answer that is run may close or write to.
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    import reasoning_gym

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps("ready"), file=answers)
    while True:
        try:
            name, config, entry, answer = pickle.load(questions)
        except EOFError:
            return
        try:
            said = float(reasoning_gym.create_dataset(name, **config).score_answer(answer, entry))
        except BaseException as error:  # an answer that is run may exit
            said = f"{type(error).__name__}: {error}"
        print(json.dumps(said), file=answers)


if __name__ == "__main__":
    serve()
