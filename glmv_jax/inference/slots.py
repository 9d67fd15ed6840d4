"""Rows of the engine's cache, seen from the host: what each holds, who works in it, and where a new request begins.

A row keeps what it holds when its request has ended, until another one needs the room. A request begins with the
longest run of first tokens that some row of the shard has read already, be that one's request over or not: G answers to
one prompt read it once, and an aborted request that comes back, or the next turn of a conversation, reads only what is
new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from glmv_jax.inference.requests import Completion, Prompt, Request, contents


@dataclasses.dataclass(eq=False)
class Work:
    """A request and how far it is.

    limit, temperature, top_p: the request's own or the engine's.
    tokens, logprobs, versions: of the answer so far.    contents: of all tokens known.
    """

    id: int
    request: Request
    limit: int
    temperature: float
    top_p: float
    on_done: Callable[[Completion], None] | None = None
    on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None

    def __post_init__(self) -> None:
        begun = self.request.begun
        self.tokens, self.logprobs, self.versions = (
            ([], [], []) if begun is None else [x.tolist() for x in (begun.tokens, begun.logprobs, begun.versions)]
        )
        self.contents = contents(self.request.prompt, np.array(self.tokens, np.int32))
        prompt = self.request.prompt
        self._position = int(prompt.positions[-1].max()) + 1  # of the answer's first token

    @property
    def prompt(self) -> Prompt:
        return self.request.prompt

    @property
    def known(self) -> int:
        """Tokens of the prompt and of the answer so far. All but the last are read before the next is drawn."""
        return len(self.prompt.tokens) + len(self.tokens)

    def cut(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, positions [n, 3]) from `start` to `stop` of those known."""
        T, prompt = len(self.prompt.tokens), self.prompt
        answer = np.array(self.tokens[max(start - T, 0) : max(stop - T, 0)], np.int32)
        first = self._position + max(start - T, 0)
        position = np.repeat(np.arange(first, first + len(answer), dtype=np.int32)[:, None], 3, axis=1)
        return np.concatenate([prompt.tokens[start:stop], answer]), np.concatenate(
            [prompt.positions[start:stop], position]
        )

    def last(self) -> tuple[int, int]:
        """The last token that is known, and its position."""
        if self.tokens:
            return self.tokens[-1], self._position + len(self.tokens) - 1
        return int(self.prompt.tokens[-1]), self._position - 1

    def add(self, tokens: np.ndarray, logprobs: np.ndarray, version: int) -> None:
        """More of the answer."""
        self.tokens += tokens.tolist()
        self.logprobs += logprobs.tolist()
        self.versions += [version] * len(tokens)

    def completion(self, reason: str) -> Completion:
        made = np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32), np.array(self.versions, np.int32)
        return Completion(*made, reason)


class Slot:
    """One row of the cache.

    held: how many entries it has, of the tokens `contents[:held]`; stale: they are of other parameters than today's.
    """

    def __init__(self, number: int, shard: int, row: int, length: int) -> None:
        self.number, self.shard, self.row = number, shard, row
        self.contents = np.zeros(length, np.int64)
        self.held, self.used, self.stale = 0, 0, False
        self.work: Work | None = None

    @property
    def free(self) -> bool:
        return self.work is None

    @property
    def missing(self) -> int:
        """Tokens to read before the row can decode."""
        return 0 if self.work is None else self.work.known - 1 - self.held

    def begin(self, work: Work, held: int, now: int) -> None:
        """Takes a request whose first `held` tokens are in the cache."""
        self.work, self.held, self.used, self.stale = work, held, now, False
        self.contents[: len(work.contents)] = work.contents

    def end(self) -> None:
        self.work = None

    def drew(self, tokens: np.ndarray) -> None:
        """Entries for the token that was the last, and for all of these but the last. `work` knows them already."""
        self.contents[self.work.known - len(tokens) : self.work.known] = tokens
        self.held += len(tokens)

    def common(self, work: Work, again: bool = False) -> int:
        """How many of the request's first tokens it has entries for; the last one is left to decoding. again: leave one
        more, to be read again."""
        if self.stale:
            return 0
        if again:
            return max(self.common(work) - 1, 0)
        most = min(self.held, work.known - 1)
        differs = self.contents[:most] != work.contents[:most]
        return int(differs.argmax()) if differs.any() else most


class Place(NamedTuple):
    """Where a request goes, the row that has read most of it, and how many tokens that is."""

    slot: Slot
    source: Slot
    common: int


def place(slots: Sequence[Slot], work: Work, again: bool = False) -> Place | None:
    """The best free slot, of those shards that read no prompt now; None if there is none.

    Best: in the shard where most has been read; then where most slots are free. There the row that has read it, if that
    is free; else the one not used for longest. again: as `Slot.common`.
    """
    reading = {slot.shard for slot in slots if slot.missing > 0}
    best, best_rank = None, ()
    for shard in sorted({slot.shard for slot in slots if slot.free} - reading):
        here = [slot for slot in slots if slot.shard == shard]
        free = [slot for slot in here if slot.free]
        source = max(here, key=lambda slot: (slot.common(work, again), slot.free))
        common = source.common(work, again)
        slot = source if source.free and common else min(free, key=lambda slot: (slot.used, slot.number))
        if (common, len(free)) > best_rank:
            best, best_rank = Place(slot, source, common), (common, len(free))
    return best
