"""Documents to rows: several texts in one row of static shape, none of which sees another.

The rows of a batch are filled together, each document going to a row with room for its tokens and its patches: the
first one, or with fit="best" the one that is left with least room. A document that fits nowhere is held back, and when
more than `ahead` are, the batch is done and they begin the next one. The iterator's state is the parent's state before
the first of them (and which of the later ones have been packed), so a checkpoint holds no arrays, and resuming reads a
few documents again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from glmv_jax.data.building import Document
from glmv_jax.data.faults import FaultLog
from glmv_jax.typing import UserError

FITS = ("first", "best")
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


class Row:
    """A row under construction, or `collate`'s row of a single document. Arrays are those of the vlm batch contract.

    targets: how many tokens of the row may be learnt (loss weight > 0), None for all.
    """

    def __init__(self, tokens: int, patches: int, channels: int, targets: int | None = None):
        self.limit = tokens if targets is None else targets
        self.arrays: dict[str, np.ndarray] = {
            "tokens": np.zeros(tokens, np.int32),  # <pad> is 0
            "positions": np.zeros((tokens, 3), np.int32),
            "segments": np.zeros(tokens, np.int32),
            "image_row": np.full(tokens, -1, np.int32),
            "loss_weight": np.zeros(tokens, np.float32),
            "source": np.full(tokens, -1, np.int32),
            "patches": np.zeros((patches, channels), np.uint8),
            "yx": np.zeros((patches, 2), np.int32),
            "frame": np.zeros(patches, np.int32),
        }
        self.documents = self.tokens = self.patches = self.merged = self.images = self.targets = 0
        self.next_position = 0
        self.trimmed: list[str] = []  # of each document that was, how

    def fits(self, document: Document) -> bool:
        """Whether the document's tokens, patches and targets all have room."""
        return (self.tokens + len(document.tokens) <= len(self.arrays["tokens"])
                and self.patches + document.patches <= len(self.arrays["frame"])
                and self.targets + document.targets <= self.limit)

    def room(self) -> float:
        """What is left of it: the shares of its tokens and of its patches, added."""
        return 2 - self.tokens / len(self.arrays["tokens"]) - self.patches / len(self.arrays["frame"])

    def add(self, document: Document, source: int) -> None:
        """Appends a document that fits."""
        a, here = self.arrays, slice(self.tokens, self.tokens + len(document.tokens))
        self.documents += 1
        self.targets += document.targets
        self.trimmed += [document.trimmed] if document.trimmed else []
        a["tokens"][here] = document.tokens
        a["segments"][here] = self.documents
        a["loss_weight"][here] = document.loss_weight
        a["source"][here] = source
        grids = []
        for number, (patches, yx) in enumerate(document.images):
            its_tokens = np.flatnonzero(document.image_of_token == number)
            merge = round((len(patches) / len(its_tokens)) ** 0.5)
            grids.append(tuple((yx.max(0) + 1) // merge))
            a["image_row"][self.tokens + its_tokens] = self.merged + np.arange(len(its_tokens))
            self._add_image(patches, yx)
            self.merged += len(its_tokens)
        a["positions"][here], self.next_position = rope_positions(document.image_of_token, grids)
        self.tokens = here.stop

    def _add_image(self, patches: np.ndarray, yx: np.ndarray) -> None:
        there = slice(self.patches, self.patches + len(patches))
        self.images += 1
        self.arrays["patches"][there], self.arrays["yx"][there] = patches, yx
        self.arrays["frame"][there] = self.images
        self.patches = there.stop


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
    return row.arrays


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
    batch = stack([row.arrays for row in rows])
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
    fit: "first" or "best".   ahead: documents that are held back at most before a batch is done.
    trimmed: batches also say for each of TRIMMED how many documents of a row it happened to, int32 [rows].
    """

    def __init__(self, parent: grain.IterDataset, *, tokens: int, patches: int, channels: int, rows: int,
                 names: Sequence[str], log: FaultLog, targets: int | None = None, fit: str = "first", ahead: int = 0,
                 trimmed: bool = False):
        super().__init__(parent)
        if fit not in FITS:
            raise UserError(f"data.fit={fit!r} is not known; use one of {', '.join(FITS)}")
        self.shape = (tokens, patches, channels, targets)
        self.rows, self.names, self.log, self.fit, self.ahead = rows, list(names), log, fit, ahead
        self.trimmed = TRIMMED if trimmed else ()

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(self._parent.__iter__(), self)


class _Held(NamedTuple):
    """A document that found no room: its number, and the parent's state before it."""

    number: int
    state: dict[str, Any]
    document: Document


class _PackIterator(grain.DatasetIterator):

    def __init__(self, parent: grain.DatasetIterator, dataset: PackIterDataset):
        super().__init__(parent)
        self._dataset = dataset
        self._held: list[_Held] = []
        self._number = 0  # of the next document of the parent

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [Row(*self._dataset.shape) for _ in range(self._dataset.rows)]
        self._held = [held for held in self._held if not self._placed(held.document, rows)]
        while len(self._held) <= self._dataset.ahead:
            read = self._read()
            if read is None:
                break
            if not self._placed(read.document, rows):
                self._held.append(read)
        if not any(row.documents for row in rows):
            raise StopIteration
        trimmed = {how: np.array([row.trimmed.count(how) for row in rows], np.int32) for how in self._dataset.trimmed}
        return stack([row.arrays for row in rows]) | trimmed

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
        if row is not None:
            row.add(document, self._dataset.names.index(document.source))
        elif any(row.documents == 0 for row in rows):
            self._dataset.log.add(document.source, document.id, "longer than a row")
        else:
            return False
        return True

    def get_state(self) -> dict[str, Any]:
        if not self._held:
            return self._parent.get_state()
        first = self._held[0].number
        held = [held.number - first for held in self._held]
        if self._number - first == 1:  # nothing was read after it
            return self._held[0].state
        return {"before": self._held[0].state, "read": self._number - first, "held": held}

    def set_state(self, state: dict[str, Any]) -> None:
        self._held = []
        if "held" not in state:
            self._parent.set_state(state)
            return
        self._parent.set_state(state["before"])
        self._number = 0
        read = [self._read() for _ in range(state["read"])]
        self._held = [read[number] for number in state["held"]]
