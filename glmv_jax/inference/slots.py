"""Rows of the engine's cache, seen from the host: what each holds, who works in it, and where a new request begins.

A row keeps what it holds when its request has ended, until another one needs the room. A request begins with the
longest run of first tokens that some row of the shard has read already, be that one's request over or not: G answers to
one prompt read it once, and an aborted request that comes back, or the next turn of a conversation, reads only what is
new. While most of a request's tokens are just being read for another one, it waits for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from glmv_jax.inference.requests import Completion, Likely, Prompt, Reason, Request


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
    on_tokens: Callable[[np.ndarray, np.ndarray, Likely | None], None] | None = None

    def __post_init__(self) -> None:
        begun = self.request.begun
        self.tokens, self.logprobs, self.versions = (
            ([], [], []) if begun is None else [x.tolist() for x in (begun.tokens, begun.logprobs, begun.versions)]
        )
        prompt = self.request.prompt
        begun = np.array(self.tokens, np.int64)
        self.contents = np.concatenate([prompt.contents, begun]) if len(begun) else prompt.contents
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

    def completion(self, reason: Reason) -> Completion:
        made = np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32), np.array(self.versions, np.int32)
        return Completion(*made, reason)


class Slots:
    """All rows, a number of each: what they hold, and for whom; and of those with a request what decoding has to know.

    contents: [N, length] of which the first `held` [N] are in the cache; goal: [N] entries that the row has to have
    before it can decode, 0 for a free one; used: [N] when it was; stale: [N] bool, what it holds is of other parameters
    than today's; shard: [N]. exact: a row is of use only with all that it holds, as its state cannot go back.
    token, position, drawn, limit, key, draw, temperature, top_p, likely: as `programs.Running` has them.
    """

    def __init__(self, count: int, shards: int, length: int, exact: bool = False) -> None:
        each = count // shards
        self.exact = exact
        self.contents = np.zeros((count, length), np.int64)
        self.held, self.goal, self.used = (np.zeros(count, np.int64) for _ in range(3))
        self.free, self.stale = np.ones(count, bool), np.zeros(count, bool)
        self.token, self.position, self.drawn, self.limit, self.draw = np.zeros((5, count), np.int32)
        self.likely = np.zeros(count, bool)
        self.key, self.temperature, self.top_p = np.zeros((count, 2), np.uint32), *np.ones((2, count), np.float32)
        self.shards, self.shard = shards, np.arange(count) // each
        self.all = [Slot(self, n, n // each, n % each) for n in range(count)]

    @property
    def reading(self) -> np.ndarray:
        """[N] bool: rows that cannot decode yet."""
        return self.goal > self.held

    def where(self, chosen_N: np.ndarray) -> list[Slot]:
        return [self.all[n] for n in np.flatnonzero(chosen_N)]

    def begin(self, rows: Sequence[int], works: Sequence[Work], held: int, now: Sequence[int]) -> None:
        """These rows take a request each, all of which know the same tokens, the first `held` of them in the cache."""
        at, first = np.asarray(rows), works[0]
        self.held[at], self.goal[at], self.used[at] = held, first.known - 1, now
        self.free[at] = self.stale[at] = False
        self.contents[at, : len(first.contents)] = first.contents
        (self.token[at], self.position[at]), self.drawn[at] = first.last(), len(first.tokens)
        for name in ("limit", "temperature", "top_p"):
            getattr(self, name)[at] = [getattr(work, name) for work in works]
        self.draw[at] = [work.request.draw for work in works]
        self.likely[at] = [work.request.likely for work in works]
        self.key[at] = [divmod(work.request.seed, 1 << 32) for work in works]
        for row, work in zip(rows, works, strict=True):
            self.all[row].work = work

    def drew(self, at: np.ndarray, counts: np.ndarray, tokens: np.ndarray) -> None:
        """Rows `at` have drawn so many tokens each, at least one, which are in `tokens` one after the other: they have
        entries for the token that was the last, and for all of these but the last."""
        ends, total = np.cumsum(counts), len(tokens)
        place = np.arange(total) + np.repeat(self.goal[at] + 1 - (ends - counts), counts)
        self.contents[np.repeat(at, counts), place] = tokens
        for numbers in (self.held, self.goal, self.position, self.drawn):
            numbers[at] += counts
        self.token[at] = tokens[ends - 1]

    def forget(self) -> None:
        """Parameters have changed: what rows hold is of no use but to those that run, and to them alone."""
        again = self.reading | self.free
        self.held[again] = 0
        self.stale |= ~again

    def common(self, work: Work, again: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """[N] each: how many of the request's first tokens rows have entries for, and will have when they have read
        what they are reading. The last one is left to decoding. again: leave one more, to be read again."""
        most = work.known - 1
        equal_NT = self.contents[:, :most] == work.contents[:most]
        same_N = np.where(equal_NT.all(axis=1), most, equal_NT.argmin(axis=1)) if most else self.held * 0
        same_N = np.where(self.stale, 0, same_N)
        use = lambda x_N: np.where(same_N >= x_N, x_N, 0 if self.exact else same_N)  # noqa: E731
        now_N, then_N = (use(x_N) for x_N in (self.held, np.maximum(self.held, self.goal)))
        return (np.maximum(now_N - 1, 0), np.maximum(then_N - 1, 0)) if again else (now_N, then_N)


class Slot:
    """One row of the cache; its numbers are those of `Slots`."""

    def __init__(self, slots: Slots, number: int, shard: int, row: int) -> None:
        self._slots, self.number, self.shard, self.row = slots, number, shard, row
        self.work: Work | Any = None  # None while it is free

    @property
    def held(self) -> int:
        return int(self._slots.held[self.number])

    @property
    def missing(self) -> int:
        """Tokens to read before the row can decode."""
        return max(int(self._slots.goal[self.number]) - self.held, 0)

    def read(self, held: int) -> None:
        """It has so many entries now."""
        self._slots.held[self.number] = held

    def end(self, now: int) -> None:
        s, n, self.work = self._slots, self.number, None
        s.goal[n], s.used[n], s.free[n] = 0, now, True


class Place(NamedTuple):
    """Where a request goes, the row that has read most of it, and how many tokens that is."""

    slot: Slot
    source: Slot
    common: int


def beside(slots: Slots, work: Work, source: Slot, count: int) -> tuple[list[Slot], int]:
    """Free slots in the shard of `source` for up to `count` requests like this one, if that has all that they are to
    begin with, else none; and how many tokens it is."""
    most = work.known - 1
    there = slots.held[source.number] == most or not slots.exact and slots.held[source.number] > most
    if not there or slots.stale[source.number]:
        return [], 0
    if not np.array_equal(slots.contents[source.number, :most], work.contents[:most]):
        return [], 0
    free = np.flatnonzero(slots.free & (slots.shard == source.shard))
    return [slots.all[n] for n in free[np.argsort(slots.used[free], kind="stable")[:count]]], most


def place(slots: Slots, work: Work, lanes: int = 1, again: bool = False) -> Place | Literal["soon"] | None:
    """The best free slot of those shards that read less than `lanes` prompts now, or need not read for it. None if
    there is none; "soon" if most of what is missing is just being read, so that it is best to wait for that.

    Best: in the shard where most has been read; then where most slots are free. There the row that has read it, if that
    is free; else the one not used for longest. again: as `Slots.common`.
    """
    have_N, soon_N = slots.common(work, again)
    most, missing = have_N.max(), work.known - 1 - have_N.max()
    if soon_N.max() > most and 2 * (soon_N.max() - most) >= missing:
        return "soon"
    reads_D = np.bincount(slots.shard[slots.reading], minlength=slots.shards)
    best, best_rank = None, (-1, 0)
    for shard in range(slots.shards):
        here = np.flatnonzero(slots.shard == shard)
        free = here[slots.free[here]]
        source = here[np.argmax(2 * have_N[here] + slots.free[here])]
        common = int(have_N[source])
        if len(free) and (reads_D[shard] < lanes or common == work.known - 1) and (common, len(free)) > best_rank:
            own = slots.free[source] and common
            slot = source if own else free[np.argmin(slots.used[free])]
            best, best_rank = Place(slots.all[slot], slots.all[source], common), (common, len(free))
    return best
