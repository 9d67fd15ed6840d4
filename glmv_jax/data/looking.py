"""What the sources of a stage give before batches are made of it: how much, how large, what was skipped and why.

Items are read as training reads them, in its order (`stream.Batches.items`). But where training puts the next record in
place of a broken one, and ends when too many are, here it is counted and passed over; a source is given up alone.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import naflex, packing, showing
from glmv_jax.data.building import Document
from glmv_jax.data.faults import BUGS, LIMIT, TRIES, Guarded, LeftOut
from glmv_jax.data.local.schema import Media, Record
from glmv_jax.data.mixture import Mixture
from glmv_jax.data.pairs.balance import Ref
from glmv_jax.data.records import Pair, Sample
from glmv_jax.typing import UserError

SEARCHED = 20_000  # further turns of the mixture that are gone through for sources whose turn has not come
IDS = 3  # kept of the records that were skipped for one reason
Size = tuple[int, int]  # width, height in pixels
GREY = 128  # what is drawn in place of a masked patch


@dataclasses.dataclass(frozen=True)
class Example:
    """One record. stored: sizes of its pictures as they are in the source. shown: what was made of it.

    parts: documents that it was split into, the first of which is shown. answer: that is right, of a question that is
    only asked; "" for none.
    """

    id: str
    stored: tuple[Size, ...]
    shown: showing.Shown
    parts: int = 1
    answer: str = ""


@dataclasses.dataclass
class Tally:
    """What was read of one source.

    wanted: its share of all draws. records: how many it has, None for one without an end. turns: draws that were its
    own, of which `drawn` gave something; the others were broken or left out. skipped: (reason, whether it is no fault)
    -> ids of the first, and how many. sizes: measure -> values, a value a document (a row, in stages 1 and 2).
    stored, seen: sizes of pictures in the source, and as the model is given them. gave_up: reason, once TRIES in a row
    had failed; the turns that were left were not read.
    """

    name: str
    wanted: float
    records: int | None = None
    turns: int = 0
    drawn: int = 0
    skipped: dict[tuple[str, bool], tuple[list[str], int]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    stored: list[Size] = dataclasses.field(default_factory=list)
    seen: list[Size] = dataclasses.field(default_factory=list)
    examples: list[Example] = dataclasses.field(default_factory=list)
    gave_up: str = ""
    _in_a_row: int = 0

    def counts(self, left_out: bool) -> int:
        """Records that were left out, or that are broken."""
        return sum(n for (_, fine), (_, n) in self.skipped.items() if fine == left_out)

    @property
    def too_many(self) -> bool:
        """Whether so large a share is broken that training would end (`faults.Guarded`)."""
        return self.counts(False) > LIMIT * (self.drawn + self.counts(False))

    def add(self, made: Made) -> None:
        """A record that gave something."""
        self.drawn, self._in_a_row = self.drawn + 1, 0
        for name, values in made.sizes.items():
            self.sizes[name] += values
        self.stored += made.stored
        self.seen += made.seen

    def skip(self, reason: str, id_: str, left_out: bool) -> None:
        """A record that gave nothing. Reasons that differ in numbers and names alone are one."""
        key = next((key for key in self.skipped if _alike(key[0]) == _alike(reason) and key[1] == left_out), None)
        ids, n = self.skipped.get(key or (reason, left_out), ([], 0))
        self.skipped[key or (reason, left_out)] = (ids if len(ids) == IDS else [*ids, id_]), n + 1
        self._in_a_row += 1
        if self._in_a_row >= TRIES:
            self.gave_up = reason


@dataclasses.dataclass(frozen=True)
class Made:
    """A record and what a source's transform made of it: a document, several, or a row of stage 1 or 2."""

    id: str
    stored: list[Size]
    documents: tuple[Any, ...]
    answer: str
    seen: list[Size]
    sizes: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Looking:
    """decode: ids -> text, with the names of special tokens. patch: side of a patch in pixels."""

    decode: Any
    patch: int

    def look(self, items: Mixture, draws: int, each: int, tick: Callable[[int, int], None] = lambda done, of: None
             ) -> list[Tally]:
        """The first `draws` items that training would take, by source, with `each` examples of every source.

        Sources whose turn did not come often enough are read on for the examples, which counts nowhere. tick: called
        with how many reads are done, and of how many.
        """
        tallies = {name: Tally(name, share, records) for name, (share, records) in sources(items).items()}
        for k in range(draws):
            self._turn(tallies, items, k, each)
            tick(k + 1, draws)
        self._examples(tallies, items, draws, each)
        return list(tallies.values())

    def _turn(self, tallies: Mapping[str, Tally], items: Mixture, k: int, each: int) -> None:
        name, guarded, index = leaf(items, k)
        tally = tallies[name]
        tally.turns += 1
        if not tally.gave_up and (made := self._made(tally, guarded, index)):
            tally.add(made)
            if len(tally.examples) < each:
                tally.examples.append(self.example(made, name))

    def _examples(self, tallies: Mapping[str, Tally], items: Mixture, start: int, each: int) -> None:
        for k in range(start, start + SEARCHED):
            few = {name for name, tally in tallies.items() if len(tally.examples) < each and not tally.gave_up}
            if not few:
                return
            name, guarded, index = leaf(items, k)
            if name in few and (made := self._made(tallies[name], guarded, index)):
                tallies[name].examples.append(self.example(made, name))

    def _made(self, tally: Tally, guarded: Guarded, index: int) -> Made | None:
        """None for a record that was skipped, which the tally then says."""
        record, id_ = None, f"{tally.name}/{index}"
        try:
            record = guarded.source[index]
            id_ = guarded.id(record, index)
            if isinstance(record, Ref):  # read once, for what it is and for what is made of it
                read = record.reader[record.index]
                record, given = read, Ref(record.id, {record.index: read}, record.index)
            else:
                given = record
            return self.measured(record, guarded.made_of(given, index), id_)
        except BUGS:
            raise
        except LeftOut as error:
            tally.skip(str(error), id_, left_out=True)
        except Exception as error:  # noqa: BLE001 - as `faults.Guarded`: whatever a broken record raises
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            tally.skip(f"{kind}{error}".replace(id_, "…"), id_, left_out=False)
        return None

    # ------------------------------------------------------------------------------------------------- what was made
    def measured(self, record: Any, made: Any, id_: str) -> Made:
        """Sizes of a record and of what was made of it."""
        answer = ""
        if isinstance(made, tuple):  # (Sample, Document) of a question that is asked
            made, answer = made[1], made[0].answer
        documents = tuple(made) if isinstance(made, list) else (made,)
        sizes: dict[str, list[int]] = collections.defaultdict(list)
        seen: list[Size] = []
        for document in documents:
            row = document if isinstance(document, dict) else None
            for name, value in (_of_document(document) if row is None else _of_row(row)).items():
                sizes[name].append(value)
            grids = [yx for _, yx in document.images] if row is None else [row["yx"][row["frame"] > 0]]
            seen += [tuple((int(n) + 1) * self.patch for n in yx.max(0)[::-1]) for yx in grids]  # type: ignore[misc]
        return Made(id_, list(stored_sizes(record)), documents, answer, seen, dict(sizes))

    def example(self, made: Made, source: str) -> Example:
        """The first document of a record, or its row, as it is shown."""
        first = made.documents[0]
        if isinstance(first, Document):
            channels = first.images[0][0].shape[1] if first.images else 3 * self.patch**2
            named = dataclasses.replace(first, source=source)
            row = packing.pack([named], len(first.tokens), max(first.patches, 4), channels, [source])
            (shown,) = showing.read(packing.stack([row]), self.decode, [source], self.patch)
        else:
            shown = self._row(first, source)
        return Example(made.id, tuple(made.stored), shown, len(made.documents), made.answer)

    def _row(self, row: Mapping[str, np.ndarray], source: str) -> showing.Shown:
        real = row["frame"] > 0
        patches, yx, n = row["patches"][real], row["yx"][real], int(real.sum())
        frames = showing.pixels(patches, yx, self.patch)
        runs = [showing.Run("", 0.0, n, 0)]
        if "mask" in row:
            hidden = np.where(row["mask"][real][:, None], GREY, patches).astype(np.uint8)
            frames += showing.pixels(hidden, yx, self.patch)
            runs.append(showing.Run(f"{int(row['mask'].sum())} of {n} patches masked", 0.0, 0))
        for segment in range(1, int(np.max(row.get("segments", 0), initial=0)) + 1):
            ids = row["tokens"][row["segments"] == segment]
            runs.append(showing.Run(f"{self.decode.decode(ids.tolist())}\n", 1.0, len(ids)))
        return showing.Shown(0, 1, source, tuple(runs), (showing.Picture(frames, n, unit="patches"),),
                             sum(run.tokens for run in runs[1:]), 0)  # fmt: skip


def sources(items: Mixture) -> dict[str, tuple[float, int | None]]:
    """name -> (share among the items, records; None without an end). One may be in several mixtures of a mixture."""
    found: dict[str, tuple[float, int | None]] = {}
    for name, share in items.shares.items():
        source = items.sources[name]
        inner = source.source if isinstance(source, Guarded) else source
        own = sources(inner) if isinstance(inner, Mixture) else {name: (1.0, getattr(source, "records", None))}
        for below, (part, records) in own.items():
            found[below] = found.get(below, (0.0, None))[0] + share * part, records
    return found


def leaf(items: Mixture, k: int) -> tuple[str, Guarded, int]:
    """Item k -> (name of its source, what guards it, the index there)."""
    source: Any = items
    while isinstance(source, Mixture):
        name, source, k = source.within(k)
    if isinstance(source.source, Mixture):
        name = source.source.within(k)[0]
    return name, source, k


def stored_sizes(record: Any) -> Iterator[Size]:
    """Of the pictures of a record; films have none that is known without decoding them."""
    if isinstance(record, Sample):
        yield from (image.size for image in record.images)
    elif isinstance(record, Pair):
        yield _size(record.image)
    elif isinstance(record, Record):
        media = [*record.media, *(each for each in record.segments if isinstance(each, Media))]
        yield from (_size(each.content) for each in media if each.kind == "image")
    elif isinstance(record, tuple):
        yield record[1].size


def _size(image: Image.Image | bytes) -> Size:
    if isinstance(image, Image.Image):
        return image.size
    with naflex.opened(image) as picture:
        return picture.size


def _of_document(document: Document) -> dict[str, int]:
    return {"tokens": len(document.tokens), "learnt tokens": document.targets, "pictures": len(document.images),
            "patches": document.patches}  # fmt: skip


def _of_row(row: Mapping[str, np.ndarray]) -> dict[str, int]:
    sizes = {"patches": int((row["frame"] > 0).sum())}
    if "mask" in row:
        sizes["masked patches"] = int(row["mask"].sum())
    if "tokens" in row:
        sizes["tokens"] = int((row["segments"] > 0).sum())
    return sizes


def _alike(reason: str) -> str:
    """A reason without what differs from record to record: numbers, addresses, quoted names and paths."""
    return re.sub(r"0x[0-9a-f]+|'[^']*'|\S*[/\\]\S*|\d+", "#", reason)


# --- numbers for tables -----------------------------------------------------------------------------------------------

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
SAID = ("least", "5 %", "half", "95 %", "most")  # what the quantiles are called


@dataclasses.dataclass(frozen=True)
class Spread:
    """A measure of one source. values: at QUANTILES, as text. bins: how many lie in each of BINS equal parts."""

    measure: str
    values: tuple[str, ...]
    bins: tuple[int, ...]


BINS = 12


def spreads(tally: Tally) -> list[Spread]:
    """Of all measures that say something; pictures are put in order by their area."""
    found = [_spread(name, sorted(values), [str(v) for v in sorted(values)])
             for name, values in tally.sizes.items() if any(values)]  # fmt: skip
    for name, sizes in (("pixels stored", tally.stored), ("pixels seen", tally.seen)):
        if sizes:
            ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
            found.append(_spread(name, [w * h for w, h in ordered], [f"{w}x{h}" for w, h in ordered]))
    return found


def _spread(measure: str, values: Sequence[int], said: Sequence[str]) -> Spread:
    at = [said[round(q * (len(said) - 1))] for q in QUANTILES]
    counts, _ = np.histogram(values, BINS, (values[0], max(values[-1], values[0] + 1)))
    return Spread(measure, tuple(at), tuple(counts.tolist()))


def tokens_share(tallies: Sequence[Tally]) -> dict[str, float]:
    """Of all tokens (where there are none, patches) that were read, by source."""
    measure = "tokens" if any(tally.sizes.get("tokens") for tally in tallies) else "patches"
    sums = {tally.name: sum(tally.sizes.get(measure, ())) for tally in tallies}
    return {name: n / max(1, sum(sums.values())) for name, n in sums.items()}
