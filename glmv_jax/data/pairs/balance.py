"""Which pair comes next: sources by weight, languages in an exact share, each host its own part, some held out.

Every text that is drawn has a language. A source's records that have one language are an order of their own; the orders
of one language are mixed in the proportion weight * (share of the source's records with that language), so within a
language the sources come as their weights say; and the two languages are mixed in the share that is asked for. Both
mixtures are exact (`mixture`), and a record that cannot be read is replaced from its own order, so over any n texts the
number of Chinese ones is within one of share * n. A record with both languages is in both orders.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from glmv_jax.data.emoji import LANGUAGES
from glmv_jax.data.faults import BUGS, FaultLog
from glmv_jax.data.mixture import Mixture
from glmv_jax.data.pairs import Source
from glmv_jax.data.pairs.reader import Reader
from glmv_jax.typing import UserError

FILES_A_HOST = 16  # with fewer, hosts share out the records of every file
LEAST = 1e-5  # a source in which a language has a smaller share, or that has a smaller share of a language, is left out
WINDOW = 1024  # records of blocks that are read side by side
TRIES = 1000
SMALL = 1 << 16  # up to here a permutation is drawn: an index shuffle of few costs up to milliseconds

Part = tuple[Source, Reader, slice]  # a source, what reads this host's files of it, which of their records are its own

WRONG = 1 << len(LANGUAGES)  # in the index: has no text that could be read


class Ref(NamedTuple):
    """A record that is not read yet; what fails in reading it is logged under its id."""

    id: str
    reader: Any  # pairs.reader.Reader, or one of `data.local`
    index: int  # type: ignore[assignment]  # in place of a tuple's own, which nobody asks


def opened(sources: Mapping[str, Any], shard: int, shards: int, log: FaultLog, cache: str | None = None
           ) -> dict[str, tuple[Any, Any, slice]]:
    """This host's part of each source: some of its files, or where those are few, some records of every file.

    Either is dealt out in a random order, the same on all hosts: one in which languages take turns is often met.
    """
    found = {}
    for name, source in sources.items():
        files, part = source.files(), slice(shard, None, shards)
        if len(files) >= FILES_A_HOST * shards:
            files, part = [files[n] for n in dealt(len(files), part)], slice(None)
        found[name] = source, source.open(files, name, log, cache), part
    return found


def dealt(n: int, part: slice) -> np.ndarray:
    """This part of 0 ... n - 1 in a random order, put in order again."""
    if part in (slice(None), slice(0, None, 1)):
        return np.arange(n)
    return np.sort(np.random.default_rng(n).permutation(n)[part])


def held_out(id_: str, share: float) -> bool:
    """Whether a record is kept for evaluation: a function of its id, so the same in every run and on every host."""
    return place(id_) < share * 2**64


def place(id_: str) -> int:
    """Where a record lies among all that there might be, of 2^64: a share holds out those below it."""
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest(), "big")


def languages(source: Source, reader: Reader) -> np.ndarray:
    """uint8 [records]: bit n for a text in LANGUAGES[n]; WRONG for one whose text cannot be read.

    Reads every text once, unless the source declares its language; the result is kept in the cache.
    """
    if source.lang != "auto":
        return np.full(len(reader), 1 << LANGUAGES.index(source.lang), np.uint8)

    said: list[bool] = []

    def of_file(file: int) -> np.ndarray:
        if not said:
            print(f"source {reader.name!r}: reading all {len(reader):,} texts once, for their languages; "
                  "a source whose lang is declared needs no reading", file=sys.stderr)
            said.append(True)
        start = reader.start(file)
        return np.array([_bits(reader, i) for i in range(start, start + reader.counts[file])], np.uint8)

    return reader.per_file("languages", of_file)


def _bits(reader: Reader, i: int) -> int:
    try:
        return sum(1 << LANGUAGES.index(lang) for lang in reader.texts(i))
    except BUGS:
        raise
    except Exception:  # noqa: BLE001 - it is logged when its turn comes to be read
        return WRONG


class Order:
    """Some records of one source, each once an epoch in a new order, without end. Item i is a `Ref`.

    Where a file gives records in blocks (parquet's row groups), a few are read side by side: the blocks are shuffled,
    then the records within each window of about WINDOW records. A held-out record gives way to the next one.
    """

    def __init__(self, reader: Reader, rows: np.ndarray, seed: int, heldout: float) -> None:
        self.reader, self.rows, self.seed, self.heldout = reader, rows, seed, heldout
        starts = np.unique(np.searchsorted(rows, reader.blocks()))
        self._starts = np.append(starts[starts < len(rows)], len(rows))  # of the blocks, among `rows`
        self._width = max(2, -(-WINDOW * (len(self._starts) - 1) // len(rows)))  # blocks of a window
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int) -> Ref:
        epoch, place = divmod(i, len(self.rows))
        for step in range(min(TRIES, len(self.rows))):
            row = int(self.rows[self._shuffled(epoch, (place + step) % len(self.rows))])
            id_ = self.reader.id(row)
            if not held_out(id_, self.heldout):
                return Ref(id_, self.reader, row)
        name = self.reader.name
        raise UserError(f"source {name!r}: all records are held out at data.heldout={self.heldout}; lower it")

    def _shuffled(self, epoch: int, place: int) -> int:
        blocks, ends = self._blocks(epoch)
        first = int(np.searchsorted(ends, place, side="right")) // self._width * self._width  # of its window's blocks
        start, end = (int(ends[n - 1]) if n else 0 for n in (first, min(first + self._width, len(ends))))
        place = start + self._in_window(epoch, start, end - start, place - start)
        block = int(np.searchsorted(ends, place, side="right"))
        return int(self._starts[blocks[block]]) + place - (int(ends[block - 1]) if block else 0)

    def _in_window(self, epoch: int, start: int, n: int, place: int) -> int:
        if n > SMALL:
            import grain  # here, because graders of windows come this way and do without

            seed = (self.seed + epoch) % 2**32
            return grain.experimental.index_shuffle(place, max_index=n - 1, seed=seed, rounds=4)
        if self._window is None or self._window[0] != (epoch, start):
            self._window = (epoch, start), np.random.default_rng([self.seed, epoch, start]).permutation(n)
        return int(self._window[1][place])

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in this epoch's order, and where each ends in it."""
        if self._epoch is None or self._epoch[0] != epoch:
            blocks = np.random.default_rng([self.seed, epoch]).permutation(len(self._starts) - 1)
            self._epoch = epoch, blocks, np.cumsum(np.diff(self._starts)[blocks])
        return self._epoch[1:]


class Balanced:
    """This host's part of all sources, by language.

    chinese: share of the Chinese among the texts that are drawn; None: both languages of each record, and only records
        that have both.
    Raises: UserError where a language that is asked for has no text, or a host no record.
    """

    def __init__(self, parts: Mapping[str, Part], chinese: float | None, heldout: float) -> None:
        if chinese is not None and not 0 <= chinese <= 1:
            raise UserError(f"data.chinese={chinese} is no share; give a number from 0 to 1")
        self.sources = {name: source for name, (source, _, _) in parts.items()}
        self._readers = {name: reader for name, (_, reader, _) in parts.items()}
        self._heldout = heldout
        if chinese is None:
            self._shares: dict[tuple[str, ...], float] = {LANGUAGES: 1.0}
        else:
            self._shares = {lang: share for lang, share in ((("en",), 1 - chinese), (("zh",), chinese)) if share}
        self._rows: dict[tuple[str, ...], dict[str, np.ndarray]] = {langs: {} for langs in self._shares}
        self._weights: dict[tuple[str, ...], dict[str, float]] = {langs: {} for langs in self._shares}
        for name, (source, reader, part) in parts.items():
            self._add(name, source, languages(source, reader), part)
        for langs, weights in self._weights.items():
            if not weights:
                raise UserError(_missing(langs, chinese, parts))

    def _add(self, name: str, source: Source, bits: np.ndarray, part: slice) -> None:
        rows = dealt(len(bits), part).astype(np.uint32 if len(bits) < 2**32 else np.int64)
        bits = bits[rows]
        if not len(rows):
            raise UserError(f"source {name!r} has too few records for so many hosts; use fewer")
        wants = {langs: sum(1 << LANGUAGES.index(lang) for lang in langs) for langs in self._shares}
        shares = {langs: float((bits & want == want).mean()) for langs, want in wants.items()}
        for langs, want in wants.items():
            if shares[langs] >= LEAST:
                take = bits & want == want
                if shares[langs] == max(shares.values()):  # what cannot be read is met here, logged and skipped
                    take |= bits == WRONG
                self._rows[langs][name] = rows[take]
                self._weights[langs][name] = source.weight * shares[langs]

    def mixed(self, seed: int, guard: Callable[[Order, tuple[str, ...], str], Any]) -> Mixture:
        """Endless random access. guard(order, languages of a row, source's name) -> random access of what it makes."""
        by_language = {}
        for n, (langs, weights) in enumerate(self._weights.items()):
            total = sum(weights.values())
            shares = {name: weight / total for name, weight in weights.items() if weight >= LEAST * total}
            own = seed + 104_729 * n  # or records with both languages would come in both, one after the other
            orders = {name: guard(Order(self._readers[name], self._rows[langs][name], own, self._heldout), langs, name)
                      for name in shares}
            by_language["+".join(langs)] = Mixture(orders, shares)
        return Mixture(by_language, {"+".join(langs): share for langs, share in self._shares.items()})

    def count(self) -> dict[str, dict[str, int]]:
        """Records of this host by languages and source."""
        return {"+".join(langs): {name: len(rows) for name, rows in by.items()} for langs, by in self._rows.items()}


def _missing(langs: Sequence[str], chinese: float | None, parts: Mapping[str, Any]) -> str:
    where = f"this host's part of {', '.join(parts)}"
    if chinese is None:
        return f"data.both_languages: no record with texts in both in {where}; set it to False"
    name = {"en": "English", "zh": "Chinese"}[langs[0]]
    remedy = "add a source of it, declare a source's lang, or set data.chinese to " + ("0" if langs[0] == "zh" else "1")
    return f"data.chinese={chinese}: no {name} text in {where}; {remedy}"
