"""What a sweep says while it runs: what begins and ends, how far everything is, and how long it will take."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from glmv_jax.eval.report_tables import duration
from glmv_jax.train.sweep.child import progress_of
from glmv_jax.train.sweep.plan import Run

PLAIN_EVERY = 30.0  # seconds between progress lines where there is no terminal


class Board:
    """Lines of what begins and ends, and one of where the sweep is: live on a terminal, now and then elsewhere."""

    def __init__(self, runs: list[Run], workdir: Path, jobs: int) -> None:
        self._runs, self._workdir, self._jobs = runs, workdir, jobs
        self._console = Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._next = time.monotonic() + (1.0 if self._console.is_terminal else PLAIN_EVERY)
        self._first: dict[str, int] = {}  # the step that a run had when this call began it
        self._spent: dict[str, tuple[float, int]] = {}  # seconds and steps of this call, by run

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(f"sweep: {text}"), soft_wrap=True)

    def begin(self, each: Run) -> None:
        self._first[each.name] = step = progress_of(self._workdir / each.name)[0]
        self.say(f"{each.name} {f'goes on from about step {step}' if step else 'begins'}, {each.steps} steps")

    def end(self, each: Run, seconds: float) -> None:
        self._note(each.name, seconds)
        self.say(f"{each.name} {each.status} after {duration(seconds)}" + (f": {each.error}" if each.error else ""))

    def _note(self, name: str, seconds: float) -> tuple[int, float | None]:
        step, loss = progress_of(self._workdir / name)
        self._spent[name] = seconds, step - self._first[name]
        return step, loss

    def update(self, active: Mapping[str, float]) -> None:
        """Shows where it is, if it is time to. active: seconds that each process has run."""
        if time.monotonic() < self._next:
            return
        now = {name: self._note(name, seconds) for name, seconds in active.items()}
        states = collections.Counter(each.status for each in self._runs)
        parts = [f"{states['finished']}/{len(self._runs)} finished"]
        parts += [f"{states['failed']} failed"] if states["failed"] else []
        open_runs = [each for each in self._runs if each.status in ("waiting", "running")]
        left = [(each, now.get(each.name, (0, None))[0]) for each in open_runs]
        if (seconds := eta(left, self._spent, self._jobs)) is not None:
            parts.append(f"eta {duration(seconds)}")
        steps = {each.name: each.steps for each in self._runs}
        parts += [
            f"{name} {step}/{steps[name]}" + (f" loss {loss:.4g}" if loss else "") for name, (step, loss) in now.items()
        ]
        line = Text(f"sweep: {'  '.join(parts)}")
        if not self._console.is_terminal:
            self._console.print(line, soft_wrap=True)
            self._next = time.monotonic() + PLAIN_EVERY
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(line, refresh=True)
        self._next = time.monotonic() + 1.0

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def eta(left: Sequence[tuple[Run, int]], spent: Mapping[str, tuple[float, int]], jobs: int) -> float | None:
    """Seconds until the last run ends, None before any step has been seen.

    left: runs that are not over, each with the step it is at. spent: run name -> (seconds, steps) of this call, set-up
    and evaluations included, which is why they are not left out of what is to come either.
    """
    seen = [(seconds, steps) for seconds, steps in spent.values() if steps > 0]
    if not seen or not left:
        return None
    a_step = sum(seconds for seconds, _ in seen) / sum(steps for _, steps in seen)
    each = [a_step * max(0, run.steps - step) for run, step in left]
    each = [min(seconds, run.max_seconds or seconds) for seconds, (run, _) in zip(each, left)]
    return sum(each) / min(jobs, len(each))
