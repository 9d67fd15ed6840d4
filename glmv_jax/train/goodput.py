"""Where the wall time of a run went, over all its attempts: what of it made progress, and what did not.

The loop says at each turn what it does now, one of PARTS (see `eval.goodput`, which reads the account); `Goodput` adds
up the seconds and appends them to goodput.jsonl, which no resume ever cuts. A row is

    {"attempt": 1, "step": 40, "seconds": {"steps": 12.3, "evaluation": 1.0}}

the seconds since the row before it, spent on the way to that step. There is one at every checkpoint, so that after a
kill it is known what came behind the checkpoint that the next attempt began from: that work was lost, and is moved to
"lost", however well it was done. Seconds between the last row and a kill are in no row: `EVERY` bounds them.

Time that a batch takes to come counts as "data wait" only where the devices had nothing to do meanwhile.
"""

from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmv_jax.eval.goodput import is_row, summary
from glmv_jax.train.disk import disk_errors
from glmv_jax.train.metrics import read_jsonl

EVERY = 5.0  # seconds between rows, if not more often


class Goodput:
    """The account of a run. As soon as it is made time counts, as "start-up".

    Args: path: goodput.jsonl of the run. writes: whether rows are written; of several processes one does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self._rows = read(path)
        self._attempt = max((row["attempt"] for row in self._rows), default=0) + 1
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._part, self._since = "start-up", time.monotonic()
        self._written = self._since
        self._torn = path.exists() and not path.read_bytes().endswith(b"\n")

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """A block whose time is that part's; afterwards it is again what it was before."""
        before = self.turn(part)
        try:
            yield
        finally:
            self.turn(before)

    def turn(self, part: str) -> str:
        """From now on time is `part`'s; returns whose it was."""
        now, before = time.monotonic(), self._part
        self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def move(self, seconds: float, source: str, target: str) -> None:
        """Of this row's time, what turned out to be another part's."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def row(self, step: int, *, due: bool = True, signal: int | None = None) -> None:
        """Writes down what was spent on the way to `step`. due: False: only if the last row is `EVERY` seconds old.
        signal: that ends this attempt; 0 for one that came to another process."""
        if not due and time.monotonic() - self._written < EVERY:
            return
        self.turn(self._part)
        seconds = {part: round(spent, 4) for part, spent in self._seconds.items() if spent}
        row = {"attempt": self._attempt, "step": step, "seconds": seconds}
        row |= {} if signal is None else {"signal": signal}
        self._rows.append(row)
        self._seconds.clear()
        self._written = self._since
        if self._writes:
            with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write("\n" * self._torn + json.dumps(row) + "\n")
            self._torn = False

    def summary(self) -> dict[str, Any]:
        """Of all rows so far, see `summary`."""
        return summary(self._rows)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a goodput.jsonl; what a kill cut off is left out."""
    return [row for row in read_jsonl(path) if is_row(row)]


def line(found: dict[str, Any]) -> str:
    """For people: `goodput 81% of 12 min: steps 81%, start-up 6%, ...; 2 attempts`, the largest first."""
    spent = sum(found["seconds"].values())
    ordered = sorted(found["seconds"].items(), key=lambda item: -item[1])
    shares = ", ".join(f"{part} {seconds / spent:.0%}" for part, seconds in ordered if seconds >= 0.005 * spent)
    attempts = f"; {found['attempts']} attempts" if found["attempts"] > 1 else ""
    return f"goodput {found['goodput']:.0%} of {spent:.0f} s: {shares}{attempts}"
