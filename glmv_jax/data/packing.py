"""Documents to rows: several texts in one row of static shape, none of which sees another.

The rows of a batch are filled together, each document going to a row with room for its tokens and its patches: the
first one, or with fit="best" the one that is left with least room. A document that fits nowhere is held back, and when
more than `ahead` are, the batch is done and they begin the next one.

With fit="balanced" documents are held until `ahead` more have been read than the rows can hold, and then placed all at
once, so that the rows are even in tokens and in patches (`balancing.fill`). Hosts, which pack apart, are even to one
another where full rows are alike: when a row holds the patches that come with its tokens and no more
(benchmarks/vision_balance.py).

The iterator's state is the parent's state before the first of the documents held (and which of the later ones have been
packed), so a checkpoint holds no arrays, and resuming reads a few documents again.

A row's patches may be cut into slices for the ranks of a context group (`partition`); text stays whole. Or images go to
rows of the encoder's own (`encoding`), and a document is placed where both it and its images have room.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from glmv_jax.data import balancing, encoding, partition
from glmv_jax.data.building import Document
from glmv_jax.data.faults import FaultLog
from glmv_jax.typing import UserError

FITS = ("first", "best", "balanced")
TRIMMED = ("split", "cut")  # what may have been done to a document that was longer than a row


def rope_positions(image_of_token: np.ndarray, grids: Sequence[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Rotary positions (time, height, width) of one document and the position of the token that would follow.

    Text counts up in all three. An image of merged grid (h, w) that starts at s takes (s, s + y, s + x), row by row,
    and the text after it goes on at s + max(h, w). GLM-OCR's `get_rope_index`
    (transformers 5 `models/glm_ocr/modeling_glm_ocr.py`). Returns (int32 [T, 3], int).
    """
    positions_T3 = np.empty((len(image_of_token), 3), np.int32)
    cursor = position = 0
    for number, (h, w) in enumerate(grids):
        start = int(np.argmax(image_of_token == number))
        positions_T3[cursor:start] = np.arange(position, position + start - cursor)[:, None]
        position += start - cursor
        y, x = np.divmod(np.arange(h * w), w)
        positions_T3[start:start + h * w] = position + np.stack([np.zeros_like(y), y, x], 1)
        cursor, position = start + h * w, position + max(h, w)
    rest = len(image_of_token) - cursor
    positions_T3[cursor:] = np.arange(position, position + rest)[:, None]
    return positions_T3, position + rest


class Loads(NamedTuple):
    """What a document takes of a row, or a row has."""

    tokens: int
    patches: int
    targets: int
    images: float

    @classmethod
    def of_row(cls, tokens: int, patches: int, targets: int | None = None, images: int | None = None) -> Loads:
        """Limits; None for all tokens, and for any number of images."""
        return cls(tokens, patches, tokens if targets is None else targets, math.inf if images is None else images)


def loads(document: Document) -> Loads:
    """What a document takes of a row."""
    return Loads(len(document.tokens), document.patches, document.targets, len(document.images))


class Row:
    """A row under construction, or `collate`'s row of a single document.

    targets: how many tokens of the row may be learnt (loss weight > 0), None for all.   images: None for any number.
    """

    def __init__(
        self, tokens: int, patches: int, channels: int, targets: int | None = None, images: int | None = None
    ):
        self.limits = Loads.of_row(tokens, patches, targets, images)
        self.channels = channels
        self.text: dict[str, np.ndarray] = {
            "tokens": np.zeros(tokens, np.int32),  # <pad> is 0
            "positions": np.zeros((tokens, 3), np.int32),
            "segments": np.zeros(tokens, np.int32),
            "image_row": np.full(tokens, -1, np.int32),
            "loss_weight": np.zeros(tokens, np.float32),
            "source": np.full(tokens, -1, np.int32),
        }
        self.images: list[tuple[np.ndarray, np.ndarray]] = []
        self.encoded: list[int] = []  # numbers of the images in `encoding.Filling`, where the encoder has own rows
        self.documents = self.tokens = self.patches = self.merged = self.targets = 0
        self.next_position = 0
        self.trimmed: list[str] = []  # of each document that was, how

    def fits(self, document: Document) -> bool:
        """Whether the document's tokens, patches, targets and images all have room."""
        filled, more = (self.tokens, self.patches, self.targets, len(self.images)), loads(document)
        return all(have + load <= limit for have, load, limit in zip(filled, more, self.limits))

    def room(self) -> float:
        """What is left of it: the shares of its tokens and of its patches, added."""
        return 2 - self.tokens / self.limits.tokens - self.patches / self.limits.patches

    def add(self, document: Document, source: int) -> None:
        """Appends a document that fits."""
        text, here = self.text, slice(self.tokens, self.tokens + len(document.tokens))
        self.documents += 1
        self.targets += document.targets
        self.trimmed += [document.trimmed] if document.trimmed else []
        text["tokens"][here] = document.tokens
        text["segments"][here] = self.documents
        text["loss_weight"][here] = document.loss_weight
        text["source"][here] = source
        grids = []
        for number, (patches, yx) in enumerate(document.images):
            its_tokens = np.flatnonzero(document.image_of_token == number)
            merge = round((len(patches) / len(its_tokens)) ** 0.5)
            grids.append(tuple((yx.max(0) + 1) // merge))
            text["image_row"][self.tokens + its_tokens] = self.merged + np.arange(len(its_tokens))
            self.images.append((patches, yx))
            self.patches += len(patches)
            self.merged += len(its_tokens)
        text["positions"][here], self.next_position = rope_positions(document.image_of_token, grids)
        self.tokens = here.stop

    def arrays(self, slices: partition.Slices = partition.WHOLE) -> dict[str, np.ndarray]:
        """Those of the vlm batch contract. The patches are those of this process' slices, `image_row` counts in all."""
        cut = partition.cut([len(patches) for patches, _ in self.images], slices.ranks, self.limits.patches)
        places = cut.size * len(slices.made)
        numbers = (np.full(len(patches), number, np.int32) for number, (patches, _) in enumerate(self.images, start=1))
        made: dict[str, tuple[Iterator[np.ndarray], np.ndarray]] = {
            "patches": ((patches for patches, _ in self.images), np.zeros((places, self.channels), np.uint8)),
            "yx": ((yx for _, yx in self.images), np.zeros((places, 2), np.int32)),
            "frame": (numbers, np.zeros(places, np.int32)),
        }
        vision = {name: cut.take(pieces, out, slices.made) for name, (pieces, out) in made.items()}
        return self.text | {"image_row": cut.rows(self.text["image_row"])} | vision


def pack(documents: Sequence[Document], tokens: int, patches: int, channels: int, names: Sequence[str]
         ) -> dict[str, np.ndarray]:
    """Documents that fit together -> the arrays of one row. Raises UserError when they do not fit.

    names: source names; a token's `source` is the index of its document's source among them.
    """
    row = Row(tokens, patches, channels)
    for document in documents:
        if not row.fits(document):
            raise UserError(f"{document.id}: no room in a row of {tokens} tokens and {patches} patches; enlarge it")
        row.add(document, names.index(document.source))
    return row.arrays()


def collate(documents: Sequence[Document], tokens: int, patches: int, channels: int, names: Sequence[str]
            ) -> dict[str, np.ndarray]:
    """One document a row, for prompts and evaluation: the vlm batch and, for the sampler,

    length [B] int32, tokens in the row; next_position [B] int32, the rotary position of the first generated token.
    """
    rows = []
    for document in documents:
        row = Row(tokens, patches, channels)
        if not row.fits(document):
            raise UserError(f"{document.id}: {len(document.tokens)} tokens and {document.patches} patches do not fit "
                            f"a row of {tokens} and {patches}; enlarge it")
        row.add(document, names.index(document.source))
        rows.append(row)
    batch = stack([row.arrays() for row in rows])
    batch["length"] = np.array([row.tokens for row in rows], np.int32)
    batch["next_position"] = np.array([row.next_position for row in rows], np.int32)
    return batch


def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of equal shapes -> a batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def efficiency(batch: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of a batch's token and patch places that are filled."""
    return {"tokens": float((batch["segments"] > 0).mean()), "patches": float((batch["frame"] > 0).mean())}


class PackIterDataset(grain.IterDataset):
    """Documents -> batches of `rows` packed rows. The last batches of a finite parent may have empty rows.

    A document that is too long even for an empty row is a fault: logged, counted, dropped.
    fit: one of FITS.   ahead: documents that are held back at most before a batch is done; with fit="balanced", that
    are held beyond those that the batch has room for.
    trimmed: batches also say for each of TRIMMED how many documents of a row it happened to, int32 [rows].
    slices: how rows are cut for a context group, and which slices this process makes.
    encoder: the encoder's rows, where images do not stay in the rows of their text; then batches have `sent` too.
    """

    def __init__(self, parent: grain.IterDataset, *, tokens: int, patches: int, channels: int, rows: int,
                 names: Sequence[str], log: FaultLog, targets: int | None = None, images: int | None = None,
                 fit: str = "first", ahead: int = 0,
                 trimmed: bool = False, slices: partition.Slices = partition.WHOLE,
                 encoder: encoding.Encoder | None = None):
        super().__init__(parent)
        if fit not in FITS:
            raise UserError(f"data.fit={fit!r} is not known; use one of {', '.join(FITS)}")
        partition.cut([], slices.ranks, patches)  # slices that are none are said now
        self.shape = (tokens, patches, channels, targets, images)
        self.rows, self.names, self.log, self.fit, self.ahead = rows, list(names), log, fit, ahead
        self.trimmed = TRIMMED if trimmed else ()
        self.slices, self.encoder = slices, encoder

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(self._parent.__iter__(), self)


class _Held(NamedTuple):
    """A document that waits: its number, and the parent's state before it."""

    number: int
    state: dict[str, Any]
    document: Document


class _PackIterator(grain.DatasetIterator):

    def __init__(self, parent: grain.DatasetIterator, dataset: PackIterDataset):
        super().__init__(parent)
        self._dataset = dataset
        self._held: list[_Held] = []
        self._filling = self._empty()
        limits = Row(*dataset.shape).limits
        self._window = balancing.Window(limits, dataset.rows, dataset.ahead, even=2)  # tokens and patches
        self._number = 0  # of the next document of the parent

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [Row(*self._dataset.shape) for _ in range(self._dataset.rows)]
        self._filling = self._empty()
        if self._dataset.fit == "balanced":
            self._place_together(rows)
        else:
            self._place_in_turn(rows)
        if not any(row.documents for row in rows):
            raise StopIteration
        trimmed = {how: np.array([row.trimmed.count(how) for row in rows], np.int32) for how in self._dataset.trimmed}
        encoder = self._dataset.encoder
        if encoder is None:
            return stack([row.arrays(self._dataset.slices) for row in rows]) | trimmed
        text = stack([row.text for row in rows])
        filling: Any = self._filling  # which there is with an encoder
        row_N = filling.evened()[[number for row in rows for number in row.encoded]]
        images = [row.images for row in rows]
        vision = encoding.arrays(encoder, row_N, images, text["image_row"], rows[0].channels)
        return text | vision | trimmed

    def _place_in_turn(self, rows: Sequence[Row]) -> None:
        """Each document as it comes."""
        self._held = [held for held in self._held if not self._placed(held.document, rows)]
        while len(self._held) <= self._dataset.ahead:
            read = self._read()
            if read is None:
                break
            if not self._placed(read.document, rows):
                self._held.append(read)

    def _place_together(self, rows: Sequence[Row]) -> None:
        """As many documents as have room, out of those and some more."""
        while not self._window.full() and (read := self._read()):
            if self._can_be_encoded(read.document) and self._window.add(loads(read.document)):
                self._held.append(read)
            else:
                self._too_long(read.document)
        encoded: dict[int, list[int]] = {}

        def admitted(n: int) -> bool:
            found = self._encoded(self._held[n].document)
            encoded[n] = found or []
            return found is not None

        row_N = self._window.place(admitted)
        for n, (row, held) in enumerate(zip(row_N, self._held)):
            if row >= 0:
                self._add(rows[row], held.document, encoded[n])
        self._held = [held for row, held in zip(row_N, self._held) if row < 0]

    def _read(self) -> _Held | None:
        """The parent's next document; None at its end."""
        state = self._parent.get_state()
        try:
            document = next(self._parent)
        except StopIteration:
            return None
        self._number += 1
        return _Held(self._number - 1, state, document)

    def _placed(self, document: Document, rows: Sequence[Row]) -> bool:
        """Whether the document is dealt with: packed, or too long for any row and dropped."""
        if self._dataset.fit == "best":
            row = min((row for row in rows if row.fits(document)), key=Row.room, default=None)
        else:
            row = next((row for row in rows if row.fits(document)), None)
        if (row is None and any(row.documents == 0 for row in rows)) or not self._can_be_encoded(document):
            self._too_long(document)
            return True
        encoded = None if row is None else self._encoded(document)
        if row is None or encoded is None:
            return False
        self._add(row, document, encoded)
        return True

    def _add(self, row: Row, document: Document, encoded: list[int]) -> None:
        row.add(document, self._dataset.names.index(document.source))
        row.encoded += encoded

    def _empty(self) -> encoding.Filling | None:
        return None if self._dataset.encoder is None else encoding.Filling(self._dataset.encoder)

    def _encoded(self, document: Document) -> list[int] | None:
        """The numbers of its images in the encoder's rows; None where these have no room for them."""
        return [] if self._filling is None else self._filling.add(document.images)

    def _can_be_encoded(self, document: Document) -> bool:
        """Whether its images would find room if they were alone."""
        empty = self._empty()
        return empty is None or empty.add(document.images) is not None

    def _too_long(self, document: Document) -> None:
        self._dataset.log.add(document.source, document.id, "longer than a row")

    def get_state(self) -> dict[str, Any]:
        if not self._held:
            return self._parent.get_state()
        first = self._held[0].number
        held = [held.number - first for held in self._held]
        if self._number - first == 1 and not self._window.late:  # nothing was read after it
            return self._held[0].state
        late = {"late": self._window.late} if self._window.late else {}
        return {"before": self._held[0].state, "read": self._number - first, "held": held} | late

    def set_state(self, state: dict[str, Any]) -> None:
        self._held = []
        self._window.restore([])
        if "held" not in state:
            self._parent.set_state(state)
            return
        self._parent.set_state(state["before"])
        self._number = 0
        read = [self._read() for _ in range(state["read"])]
        self._held = [read[number] for number in state["held"]]
        self._window.restore([loads(held.document) for held in self._held], state.get("late", 0))
