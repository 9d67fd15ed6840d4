"""Groups that were stopped before they were complete, with what had been drawn: first to go on in the next step."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

from glmv_jax.rl.pipeline.group import Group


class AbortCache:
    """First in, first out, by the prompt's uid within what was put in at once."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        self._groups: collections.deque[Group] = collections.deque(groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def put(self, group: Group) -> None:
        """Last in the row. Raises ValueError for a group with a request that still runs."""
        if any(member.request is not None for member in group.members):
            raise ValueError(f"prompt {group.prompt.uid} still has requests that run; it cannot be put aside")
        self._groups.append(group)

    def take(self, oldest: int) -> tuple[Group, list[int]]:
        """The first group; and its members that begin anew because a token of theirs is below version `oldest`."""
        group = self._groups.popleft()
        return group, group.prune(oldest)
