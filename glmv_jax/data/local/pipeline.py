"""Batches of stages 3 and 4 from files and from the built-in generators, in one mixture.

Records come in the order of `balance.Order` (each once an epoch, parquet's row groups read side by side), in exact
proportions (`mixture`), as documents (`assembling`), in packed rows. Where an epoch of a source stands, which part of a
split record comes next and which documents wait for room are all in the iterator's state.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from glmv_jax.data import encoding, local, partition
from glmv_jax.data.building import Document
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.local.assembling import Assembler
from glmv_jax.data.mixture import Mixture
from glmv_jax.data.packing import PackIterDataset
from glmv_jax.data.pairs import balance
from glmv_jax.data.pipeline import ALONE, Reading, guarded_documents
from glmv_jax.data.stream import Batches, Stream
from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Packing:
    """How rows are filled, see `packing.PackIterDataset`."""

    fit: str = "best"
    ahead: int = 16
    slices: partition.Slices = partition.WHOLE
    encoder: encoding.Encoder | None = None


def batches(
    files: Mapping[str, local.Source], generators: Mapping[str, Any], weights: Mapping[str, float],
    assembler: Assembler, *, form: str, batch: int, records: Mapping[str, Any] | None = None, power: float = 0.0,
    heldout: float = 0.0, packing: Packing = Packing(), reading: Reading = ALONE,
) -> Batches:
    """Packed rows of the sources in `files`, and beside them of `generators` (name -> random access of `Sample`) and of
    `records` (name -> of `schema.Record`, as `gui.Windows`).

    weights: of the generators and records.   power: see `shares`.   heldout: share of the files' records that is never
    trained on. `source` in a batch counts in the names of generators, records, files.
    """
    builder, log = assembler.builder, reading.log
    parts = local.opened(files, reading.shard, reading.shards, log)
    documents = guarded_documents(generators, builder, form, reading)
    for name, source in (records or {}).items():
        made = dataclasses.replace(assembler, name=name, log=log)
        documents[name] = reading.guarded(References(reading.endless(source)), made, name)
    for name, (reader, rows) in parts.items():
        made = dataclasses.replace(assembler, long=files[name].long, name=name, log=log)
        order = balance.Order(reader, rows, reading.seed, heldout)
        documents[name] = reading.guarded(order, made, name, records=len(rows))
    sizes = {name: len(rows) for name, (_, rows) in parts.items()}
    mixed = Mixture(documents, shares(files, sizes, weights, power))
    stream = Stream(mixed, reading.workers, chunk=8)
    return reading.iterator(PackIterDataset(
        Parts(stream), tokens=builder.max_tokens, patches=builder.max_patches, channels=builder.patcher.channels,
        rows=batch, names=list(documents), log=log, targets=builder.max_targets, images=builder.max_images,
        fit=packing.fit, ahead=packing.ahead, trimmed=True, slices=packing.slices, encoder=packing.encoder), mixed)


def shares(files: Mapping[str, local.Source], sizes: Mapping[str, int], weights: Mapping[str, float], power: float
           ) -> dict[str, float]:
    """How often each source is read, of all: the generators as `weights` say, a source on disk by weight * n^power.

    sizes: n, the records of each source (of this host). power: 0 for the weights alone, 1 for all records alike, a
    half between them (GLM's and others' "temperature"). UserError: a power beside generators, which have no size.
    """
    used = {name: weight for name, weight in weights.items() if weight}
    if power and used:
        raise UserError(f"data.power={power} counts the records of files, and {next(iter(used))} is a generator "
                        "without an end; set data.power=0, or leave the generators out with corpus=false")
    all_ = dict(weights) | {name: source.weight * sizes[name] ** power for name, source in files.items()}
    total = sum(all_.values())
    return {name: weight / total for name, weight in all_.items()}


def heldout_documents(name: str, source: local.Source, assembler: Assembler, share: float, limit: int, log: FaultLog
                      ) -> list[Document]:
    """Documents of up to `limit` of the records that `batches` leaves out at this share, the same on every host.

    UserError: none is held out.
    """
    reader = source.open(source.files(), name, log)
    order = np.random.default_rng(0).permutation(source.rows(reader))  # gone through until enough are found
    held = (row for row in map(int, order) if balance.held_out(reader.id(row), share))
    made = dataclasses.replace(assembler, long=source.long, name=name, log=log)
    documents: list[Document] = []
    for row in itertools.islice(held, limit):
        try:
            documents += [dataclasses.replace(document, source=name) for document in made.documents(reader[row])]
        except (UserError, OSError, ValueError) as error:
            log.add(name, reader.id(row), str(error), row)
    if not documents:
        remedy = _holding_one([reader.id(row) for row in map(int, order)], share)
        raise UserError(f"source {name!r}: no document is held out at data.heldout={share} of {len(reader)} records; "
                        f"{remedy}--config.data.heldout=0 trains on all and reports on none")
    return documents


def _holding_one(ids: list[str], share: float) -> str:
    """Which share is enough, where a larger one is what is missing."""
    least = min(map(balance.place, ids)) / 2**64
    if least < share:
        return "those that are could not be read, see faults.jsonl; "
    enough = math.floor(100 * least + 1) / 100
    return f"--config.data.heldout={enough} holds out one, " if enough < 1 else ""


@dataclasses.dataclass(frozen=True)
class References:
    """Records by number that are made only when they are read: what fails then is logged under its number."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> balance.Ref:
        return balance.Ref(str(i), self.source, i)


class Parts(grain.IterDataset):
    """Documents out of lists of them, and single ones as they are, in order.

    State: that of the parent before the list that is being read, and how many of it were given.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _PartsIterator(self._parent.__iter__())

    def __init__(self, parent: grain.IterDataset):
        super().__init__(parent)


class _PartsIterator(grain.DatasetIterator):

    def __init__(self, parent: grain.DatasetIterator):
        super().__init__(parent)
        self._waiting: list[Document] = []
        self._before: dict[str, Any] | None = None
        self._given = 0

    def __next__(self) -> Document:
        while not self._waiting:
            self._before, self._given = self._parent.get_state(), 0
            item = next(self._parent)
            self._waiting = list(item) if isinstance(item, list) else [item]
        self._given += 1
        return self._waiting.pop(0)

    def get_state(self) -> dict[str, Any]:
        if not self._waiting:
            return {"parent": self._parent.get_state(), "given": 0}
        return {"parent": self._before, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._waiting, self._given = [], 0
        if state["given"]:
            self._before = state["parent"]
            self._waiting = list(next(self._parent))[state["given"] :]
            self._given = state["given"]
