"""One arm on other machines, looked after until its end, as a process of the sweep's:

    python -m glmv_jax.train.sweep.follow '{"kind": "TpuVm", "arm": {...}, "source": ..., "here": ..., "every": 30}'

It may be ended at any time, the arm goes on; begun again, it goes by what the machines say. What it prints is the arm's
train.log here. Exit code 0: the results are here; 1: the arm has failed, and the end of its own log is printed last;
130: it was told to leave.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmv_jax.train.sweep import remote
from glmv_jax.train.sweep.remote import JobSet, RemoteError, Results, TpuVm

LOSSES = 50  # how often the machines may be taken away
BLIND = 10  # how often in a row nothing may be learnt of an arm
TRIES = 3  # to begin a run on machines that are there
SETTLE = 3  # looks at a run that has ended before it counts as failed: it may be its machines that are about to go


class _Failed(Exception):
    """The arm has come to no good end; `keep`: it may still be at work, its machines stay."""

    def __init__(self, text: str, *, keep: bool = False) -> None:
        super().__init__(text)
        self.keep = keep


class Follower:
    """An arm, its results, and how often to look (seconds)."""

    def __init__(self, arm: TpuVm | JobSet, results: Results, every: float, say: Callable[[str], Any] = print) -> None:
        self.arm, self.results, self.every, self.say = arm, results, every, say
        self.failed_tries = 0

    def run(self) -> int:
        """Brings the arm to its end and gives its machines back. Returns the exit code, 0 or 1."""
        try:
            if not self._seen(self.results.fetch):  # it may have finished while nobody looked
                self._follow()
        except _Failed as error:
            code, last, keep = 1, str(error), error.keep
        else:
            code, last, keep = 0, "finished, its results are here", False
        if not keep:
            self._give_back()
        self.say(last)
        return code

    def _follow(self) -> None:
        """Returns when the results are here."""
        asked = there = begun = False  # by this call, all three: what an earlier one saw fail is tried once more
        losses = ended = 0
        last = None
        while True:
            look = self._seen(self.arm.look)
            if look != last:
                self.say(f"{self.arm.name}: {look.said}")
            last, ended = look, ended + 1 if look.state == remote.ENDED else 0
            if look.state == remote.ABSENT:
                if there:
                    raise _Failed(f"{self.arm.name} is gone, and not by this sweep")
                begun = self._done(self.arm.submit)
                asked = there = True
            elif look.state == remote.LOST or look.state == remote.REFUSED and not asked:
                losses += look.state == remote.LOST
                if losses > LOSSES:
                    raise _Failed(f"the machines were taken away {losses} times")
                self.say("asking for other machines; the run goes on from its last checkpoint")
                self._done(self.arm.delete)
                asked = there = False
            elif look.state == remote.REFUSED:
                raise _Failed(f"there will be no machines: {look.said}; see quota and zone, or give another --type")
            else:
                there = True
                if look.state == remote.RUNNING:
                    begun = True
                    self._seen(self.results.progress)
                elif look.state in (remote.IDLE, remote.ENDED):
                    if self._seen(self.results.fetch):
                        return
                    if look.state == remote.IDLE or not begun:
                        begun = self._begin()
                    elif ended >= SETTLE:
                        raise _Failed(f"ended without results; the end of its log:\n{self._log()}")
            time.sleep(self.every)

    def _begin(self) -> bool:
        """Whether the run has begun: a machine may go in the middle of it, which the next look shows."""
        try:
            self.arm.begin()
        except RemoteError as error:
            self.failed_tries += 1
            if self.failed_tries >= TRIES:
                raise _Failed(f"could not be begun: {error}") from error
            self.say(str(error))
            return False
        self.failed_tries = 0
        return True

    def _seen(self, work: Callable[[], Any]) -> Any:
        """The work's result, tried again while the network or the other side has a bad time."""
        for _ in range(BLIND):
            try:
                return work()
            except RemoteError as error:
                self.say(str(error))
            time.sleep(self.every)
        raise _Failed(f"nothing could be learnt of it {BLIND} times in a row; it may go on by itself", keep=True)

    def _done(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RemoteError as error:
            raise _Failed(str(error)) from error

    def _log(self) -> str:
        try:
            return self.arm.log().rstrip()
        except RemoteError as error:
            return f"(cannot be read: {error})"

    def _give_back(self) -> None:
        try:
            if self.arm.look().state != remote.ABSENT:
                self.arm.delete()
        except RemoteError as error:
            self.say(f"{self.arm.name} may still be there: {error}")


def main(text: str) -> int:
    """Of the JSON above."""
    given = json.loads(text)
    arm = {"TpuVm": TpuVm, "JobSet": JobSet}[given["kind"]](**given["arm"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return Follower(arm, Results(given["source"], Path(given["here"])), given["every"]).run()
    except KeyboardInterrupt:
        print(f"no longer looked at: {arm.name} goes on by itself")
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # standard output is the process's own
    sys.exit(main(sys.argv[1]))
