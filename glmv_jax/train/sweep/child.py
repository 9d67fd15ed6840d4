"""One run as a process: its command, its end, what it took, and how far it has got."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmv_jax.train.disk import disk_errors


def train_command(experiment: str, workdir: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The command line of `glmv train` with this interpreter."""
    command = [sys.executable, "-m", "glmv_jax.cli", "train", "--config", experiment, "--workdir", str(workdir)]
    return [*command, *(f"--config.{override}" for override in overrides)]


class Child:
    """A process. What it prints is appended to `log`.

    environment: what it has besides this one's. apart: in a session of its own, so that a Ctrl-C in the terminal
    reaches it through `stop` alone, and so once.
    Attributes: exit_code: None while it runs, negative for a signal. seconds: it has run. peak_rss: bytes, when ended.
    """

    def __init__(
        self, log: Path, command: Sequence[str], *, environment: Mapping[str, str] | None = None, apart: bool = True
    ) -> None:
        self.log, self.peak_rss = log, 0
        self.exit_code: int | Any = None
        self._began, self._ended = time.monotonic(), 0.0
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as file:
                self._process = subprocess.Popen(
                    command, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL,
                    stdout=file, stderr=subprocess.STDOUT, start_new_session=apart,
                )  # fmt: skip

    def poll(self) -> bool:
        """Whether it has ended."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Waits for its end; the exit code."""
        self._wait(0)
        return self.exit_code

    def _wait(self, how: int) -> bool:
        if self.exit_code is None:
            pid, status, usage = os.wait4(self._process.pid, how)
            if pid:
                self.exit_code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_rss, self._ended = usage.ru_maxrss * 1024, time.monotonic()
        return self.exit_code is not None

    @property
    def seconds(self) -> float:
        return (self._ended or time.monotonic()) - self._began

    def stop(self, number: int, *, workers: bool = False) -> None:
        """Sends it a signal; `workers`: and all that it started."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if workers else os.kill)(self._process.pid, number)

    def last_words(self, lines: int = 1) -> str:
        """The end of what it printed."""
        return "\n".join(last_lines(self.log, lines))


def last_lines(log: Path, lines: int) -> list[str]:
    """Of what a run has printed, without the empty ones."""
    text = _tail(log).decode("utf-8", "replace")
    return [line for line in text.splitlines() if line.strip()][-lines:]


def _tail(path: Path, size: int = 8192) -> bytes:
    """The last bytes of a file, nothing when there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read()
    except FileNotFoundError:
        return b""


def progress_of(workdir: Path) -> tuple[int, float | None]:
    """(last step, loss there) by the end of metrics.jsonl; (0, None) before there is one."""
    for line in reversed(_tail(workdir / "metrics.jsonl", 1 << 17).splitlines()):  # 30 sources make lines of 15 KB
        try:
            row = json.loads(line)
        except ValueError:  # cut off, by a kill or by the edge of the tail
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row["step"], row.get("loss")
    return 0, None


class Stopper:
    """Passes SIGINT, SIGTERM and SIGHUP on to the processes: the first asks each to save and leave, the next ends them
    at once. Attributes: number: of the signal that came, 0: none. children: {name: Child}, those that run."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.number, self._say = 0, say
        self.children: dict[str, Child] = {}

    def __enter__(self) -> Stopper:
        self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: Any) -> None:
        for child in self.children.values():  # left by a bug or a full disk: they may still save
            child.stop(signal.SIGTERM)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        again, self.number = bool(self.number), number
        for child in list(self.children.values()):
            child.stop(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM, workers=again)
        if not again:
            self._say(f"{signal.Signals(number).name}: waiting for the runs to save (once more: at once, unsaved)")
