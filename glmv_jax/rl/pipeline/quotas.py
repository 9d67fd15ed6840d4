"""How many groups of each kind a batch holds. Without it a batch is whatever was complete first: a kind whose answers
take long comes late, into fewer batches, and into none at the end (arrival bias).

What a batch has to hold nobody writes down, the mixture says it. Every group has a claim of its kind, and claims stand
in the order in which prompts were drawn: the next batch is for the first n of them, so it holds as many of each kind as
the synchronous form's would. Which groups of a kind they are is free, and so the fastest are not kept waiting. A group
that is filtered out or given up takes its claim along, and the others move up.

In each kind there are as many groups as claims, so a batch can always be made of those that are there. With late="wait"
none becomes too old by it: claim number i begins no earlier than i // n batches after the first k + 1 (`most_out`), so
its group may wait for batch i // n, and by then all of its kind with earlier claims are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from glmv_jax.rl.pipeline.group import Group
from glmv_jax.rl.pipeline.protocols import Prompt


class Quotas:
    """The claims of groups that are in no batch yet.   kind: what a prompt counts as, as its source."""

    def __init__(self, kind: Callable[[Prompt], str]) -> None:
        self._kind = kind
        self._claims: list[str] = []

    def of(self, group: Group) -> str:
        return self._kind(group.prompt)

    def drawn(self, group: Group) -> None:
        """A prompt has become a group."""
        self._claims.append(self.of(group))

    def batches(self, groups: int, count: int) -> dict[str, list[int]]:
        """By kind, how many of it the next `count` batches of so many groups hold."""
        found = {kind: [0] * count for kind in self._claims}
        for i, kind in enumerate(self._claims[: groups * count]):
            found[kind][i // groups] += 1
        return found

    def picked(self, groups: Iterable[Group]) -> None:
        """They are a batch."""
        for group in groups:
            self._claims.remove(self.of(group))  # the first of its kind

    def gone(self, group: Group, others: Iterable[Group]) -> None:
        """It will be in no batch.   others: groups that are in none yet, in any order."""
        kind = self.of(group)
        before = sum(other.prompt.uid < group.prompt.uid for other in others if self.of(other) == kind)
        del self._claims[[i for i, claim in enumerate(self._claims) if claim == kind][before]]

    def get_state(self, batches: Iterable[Sequence[Group]]) -> list[str]:
        """As if these batches had not been picked."""
        return [*(self.of(group) for groups in batches for group in groups), *self._claims]

    def set_state(self, state: Mapping, groups: Iterable[Group]) -> None:
        """state: of a scheduler, which may have had no quotas.   groups: all that are in it."""
        in_order = sorted(groups, key=lambda group: group.prompt.uid)
        self._claims = list(state.get("claims") or map(self.of, in_order))
