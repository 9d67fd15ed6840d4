"""How old a token may be when it is trained on, and what follows for which groups begin and which make a batch.

Versions count updates. Batch number b is trained on by the policy of version b; a token drawn at version u is then
b - u updates old, and that may be k at most. The weights of version e reach the engine some time after update e, so
u is what the engine had, token by token, not what the trainer had.

Three things can be done about answers that take long (`Settings.late`):

    wait   the trainer waits for a group whose tokens would otherwise become too old: nothing is lost, nothing stands
           still as long as answers take less than k steps. No more than (k + 1) n groups are out, so that all can be
           trained in time: of those out, the ones due within j steps (oldest version + k <= b + j) are never more than
           (j + 1) n, at n groups a batch. `pick` keeps that true, as earliest-deadline-first scheduling does.
    drop   the trainer takes the first n that are complete; what has become too old is drawn again.
    abort  a batch ends the step for all: what is not complete is stopped, kept with what was drawn, and goes on first
           thing in the next step. A step may have a time limit as well, and then a smaller batch. k must allow for the
           steps that the longest answers take: what is too old to go on from begins anew.

k = 0 with as many groups as a batch takes is synchronous reinforcement learning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from glmv_jax.rl.pipeline.group import Group
from glmv_jax.typing import UserError

LATE = ("wait", "drop", "abort")


@dataclasses.dataclass(frozen=True)
class Settings:
    """groups:   n, of a batch.
    answers:   G, of a group.
    staleness: k, how many updates old a token may be.
    late:      what is done about groups that take long, one of LATE.
    in_flight: m, groups that are written at a time, at least n ("abort": in a step); 0 for n (k + 1), and n if "abort".
    seconds:   of a step, for "abort": whatever is complete then is the batch (the first to complete, if none is, so let
               m be larger than n: groups that go on must not be all there are); None for no limit.
    patience:  seconds after which a request that gave no sign counts as failed, or None.
    attempts:  how often an answer may fail before its prompt is given up.
    ahead:     batches that are made before the trainer asks for them, at most.
    """

    groups: int
    answers: int
    staleness: int = 1
    late: str = "wait"
    in_flight: int = 0
    seconds: float | None = None
    patience: float | None = None
    attempts: int = 3
    ahead: int = 1

    def __post_init__(self) -> None:
        if min(self.groups, self.answers, self.attempts, self.ahead) < 1 or self.staleness < 0:
            raise UserError(f"{self}: groups, answers, attempts and ahead must be at least 1, staleness at least 0")
        if self.late not in LATE:
            raise UserError(f"late={self.late!r} is not one of {', '.join(LATE)}")
        if self.in_flight and self.in_flight < self.groups:
            raise UserError(f"in_flight={self.in_flight} is less than a batch of {self.groups} groups; raise it")
        if self.seconds is not None and self.late != "abort":
            raise UserError(f"seconds={self.seconds} needs late='abort', not {self.late!r}")

    @property
    def most_in_flight(self) -> int:
        """m."""
        return self.in_flight or self.groups * (1 if self.late == "abort" else self.staleness + 1)

    def most_out(self, in_flight: int) -> int:
        """Groups that are written, complete or trained on at a time, until the engine has the weights of their update:
        those that find room in the batches to come; more only where what does not may be dropped."""
        room = self.groups * (self.staleness + 1)
        return room if self.late == "wait" else max(room, in_flight)


def pick(
    ready: Iterable[Group], out: Iterable[Group], step: int, settings: Settings, counts: Sequence[int] = ()
) -> list[Group] | None:
    """The batch of number `step`, in order of completion but for those that are due; None: not yet.

    Args: ready: complete groups in order of completion. out: those that are written. None of either is too old.
      counts: groups that this batch takes of them, and at least k that follow; n each, unless given.
    """
    ready, k = list(ready), settings.staleness
    n, *later = counts or [settings.groups] * (k + 1)
    if settings.late != "wait":
        return ready[:n] if len(ready) >= n else None
    due = sorted([g.oldest + k - step for g in (*ready, *out) if g.oldest is not None])
    chosen: list[Group] = []
    for j in range(k):
        # Those due within j more steps must leave no more behind than the j batches of them take.
        must = sum(d <= j for d in due) - sum(later[:j]) - sum(g.oldest + k - step <= j for g in chosen)
        if (must := min(must, n - len(chosen))) > 0:
            can = [g for g in ready if g.oldest + k - step <= j and g not in chosen]
            if len(can) < must:
                return None
            chosen += can[:must]
    chosen += [g for g in ready if g not in chosen][: n - len(chosen)]
    return chosen if len(chosen) == n else None
