"""Ctrl-C and SIGTERM: finish the step, save, leave."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Interrupted(SystemExit):
    """The run was asked to stop and has saved. The process leaves with 130 after Ctrl-C, so that no script goes on, and
    with 0 after SIGTERM, by which a supervisor stops what it has started (`glmv train --on-term` for another).

    number: of the signal; None where another process of the run got it.
    """

    def __init__(self, number: int | None) -> None:
        super().__init__(130 if number == signal.SIGINT else 0)
        self.number = number


class Signals:
    """From here to `restore`, the first SIGINT or SIGTERM only sets `number`; a second one ends the process.

    Within `interruptible()` the first one raises Interrupted at once: for long work that changes nothing. Not so with
    interrupts=False, for one of several processes, that would leave the others waiting.
    """

    def __init__(self, say: Callable[[str], None], *, interrupts: bool = True) -> None:
        self.number: int | None = None
        self._interrupts = interrupts
        self._say, self._raise, self._before = say, False, {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        return self.number is not None

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, _: object) -> None:
        self.number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if self._raise:
            raise Interrupted(number)
        self._say(f"{signal.Signals(number).name}: stopping after this step (once more: at once, without saving)")

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a signal may break off."""
        if self.requested and self._interrupts:
            raise Interrupted(self.number)
        self._raise = self._interrupts
        try:
            yield
        finally:
            self._raise = False
