"""Batches of the five stages, as iterators with __next__, get_state, set_state and close.

Everything is a function of (arguments, seed, index): sources are random-access, shuffled per epoch, mixed in exact
proportions, guarded against broken records, made in worker processes if asked, and batched. The state is a small
JSON-able dict; restored in a new process, with any number of workers, it gives the very next batch.

Batch contract (NumPy; B rows of this shard, P patches, C = 3 * patch**2, T tokens; `VisionInput` and `TokenInput` in
`glmv_jax.typing` say what the arrays mean):

    mim      patches [B,P,C] u8, yx [B,P,2] i32, frame [B,P] i32, mask [B,P] bool with the same number of True in
             each row, source [B] i32 (index among the sources), and image [B,S,S,3] uint8 (the crop, for teachers) or
             features: teacher -> [B,P,Ct] bf16, read from a cache
    siglip   patches, yx, frame (NaFlex: native aspect ratio, padded to the budget), tokens, segments [B,Tt] i32 (N
             texts an image side by side, each with its eos; segment n is text n, 0 padding), concept [B] i32 (of the
             shipped corpus no two alike in a batch, over all shards; rows that are alike are no negatives of each
             other), lang [B,N] i32 (index in LANGUAGES)
    vlm      tokens [B,T] i32, positions [B,T,3] i32, segments [B,T] i32, image_row [B,T] i32, loss_weight [B,T] f32,
             source [B,T] i32 (index among the sources, -1 padding), patches, yx, frame (unique in its row); or these
             three in rows of the encoder's own, and sent (`data.encoding`)
    prompts  the vlm arrays with one prompt a row, and length [B] i32, next_position [B] i32 (`packing.collate`),
             samples: the list of B `records.Sample`

Sharding: shard s of n reads its own part of every source (stage 2: its own concepts), so shards never share a record
within an epoch. `batch` counts the rows of one shard.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from glmv_jax.data.building import Document, DocumentBuilder
from glmv_jax.data.encoding import Encoder
from glmv_jax.data.faults import FaultLog, Guarded
from glmv_jax.data.hashes import image_hash
from glmv_jax.data.mixture import Mixture
from glmv_jax.data.packing import PackIterDataset, collate
from glmv_jax.data.records import Sample
from glmv_jax.data.stream import Batches, Rows, Stream, prefetched
from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a stage reads: the arguments all stages share.

    seed: of order, augmentation and masks.      shard, shards: this host's part.
    workers: processes that make items (0: none).   ahead: batches made in advance, in a thread (0: none).
    faults: file that broken records are logged to (JSONL), or None for standard error.
    """

    seed: int = 0
    shard: int = 0
    shards: int = 1
    workers: int = 0
    ahead: int = 2
    faults: str | pathlib.Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.shards:
            raise UserError(f"shard {self.shard} of {self.shards} does not exist; shards count from 0")

    @property
    def log(self) -> FaultLog:
        """Where broken records go."""
        return FaultLog(self.faults)

    def endless(self, source: Any) -> grain.MapDataset:
        """This shard's part of a source, shuffled anew in each epoch, without end."""
        if len(source) < self.shards:
            raise UserError(f"a source of {len(source)} records cannot be read by {self.shards} hosts; use fewer")
        return grain.MapDataset.source(source)[self.shard::self.shards].shuffle(seed=self.seed % 2**32).repeat()

    def guarded(self, source: Any, transform: Any, name: str, records: int | None = None) -> Guarded:
        """A source with its transform, broken records replaced. records: see there."""
        return Guarded(source, transform, name=name, seed=self.seed, log=self.log, records=records)

    def iterator(self, batches: grain.IterDataset, items: Any) -> Batches:
        """The batches, made ahead if wished. items: what they are made of, see `stream.Batches`."""
        return Batches(prefetched(batches, self.ahead) if self.ahead else iter(batches), items)


ALONE = Reading()  # one host, without worker processes


def vision_row(patches_PC: np.ndarray, yx_P2: np.ndarray, budget: int) -> Rows:
    """One image padded to the budget: patches, yx and frame (1, and 0 on padding)."""
    count, channels = patches_PC.shape
    if count > budget:
        raise UserError(f"an image of {count} patches does not fit a row of {budget}; raise the patch budget")
    row: Rows = {"patches": np.zeros((budget, channels), np.uint8), "yx": np.zeros((budget, 2), np.int32),
           "frame": np.zeros(budget, np.int32)}
    row["patches"][:count], row["yx"][:count], row["frame"][:count] = patches_PC, yx_P2, 1
    return row


def vlm_batches(
    sources: Mapping[str, Any], weights: Mapping[str, float], builder: DocumentBuilder, *, form: str, batch: int,
    encoder: Encoder | None = None, reading: Reading = ALONE,
) -> Batches:
    """Packed rows of builder.max_tokens tokens and builder.max_patches patches.

    sources: name -> random access of `Sample`; their names are what `source` counts in. form: "pretrain" or "chat".
    """
    if form not in ("pretrain", "chat"):
        raise UserError(f"unknown document form {form!r}; choose pretrain or chat")
    names = list(sources)
    documents = Mixture(guarded_documents(sources, builder, form, reading), weights)
    return reading.iterator(PackIterDataset(
        Stream(documents, reading.workers, chunk=32), tokens=builder.max_tokens, patches=builder.max_patches,
        channels=builder.patcher.channels, rows=batch, names=names, log=reading.log, targets=builder.max_targets,
        images=builder.max_images, encoder=encoder), documents)


def guarded_documents(sources: Mapping[str, Any], builder: DocumentBuilder, form: str, reading: Reading
                      ) -> dict[str, Guarded]:
    """Endless documents of each source of samples, broken ones replaced."""
    return {name: reading.guarded(reading.endless(source), _Build(builder, form, name), name)
            for name, source in sources.items()}


def prompt_batches(
    sources: Mapping[str, Any], weights: Mapping[str, float], builder: DocumentBuilder, *, batch: int,
    reading: Reading = ALONE,
) -> Batches:
    """Questions to sample answers for, one a row, with "samples", which they come from, and "hashes", of their images
    (`hashes.image_hash`), which what learns from the answers is held against. Items are (Sample, Document)."""
    asked = _asked(sources, weights, builder, reading)
    return reading.iterator(Stream(_collated(asked, list(sources), builder, batch), reading.workers), asked)


def prompt_items(
    sources: Mapping[str, Any], weights: Mapping[str, float], builder: DocumentBuilder, *, batch: int,
    reading: Reading = ALONE,
) -> grain.MapDataset:
    """Random access to the batches of `prompt_batches`."""
    return _collated(_asked(sources, weights, builder, reading), list(sources), builder, batch)


def _asked(sources: Mapping[str, Any], weights: Mapping[str, float], builder: DocumentBuilder, reading: Reading
           ) -> Mixture:
    return Mixture({name: reading.guarded(reading.endless(source), _Build(builder, "prompt", name, keep=True), name)
                    for name, source in sources.items()}, weights)


def _collated(asked: Mixture, names: Sequence[str], builder: DocumentBuilder, batch: int) -> grain.MapDataset:
    collated = functools.partial(_collate_prompts, builder=builder, names=names)
    return grain.MapDataset.source(asked).batch(batch, drop_remainder=True, batch_fn=collated)


@dataclasses.dataclass(frozen=True)
class _Build:
    """Sample -> Document under the mixture's name for its source; with `keep`, (Sample, Document)."""

    builder: DocumentBuilder
    form: str
    name: str
    keep: bool = False

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Document | tuple[Sample, Document]:
        document = dataclasses.replace(getattr(self.builder, self.form)(sample), source=self.name)
        return (sample, document) if self.keep else document


def _collate_prompts(pairs: Sequence[tuple[Sample, Document]], *, builder: DocumentBuilder, names: Sequence[str]
                     ) -> dict[str, Any]:
    hashes = [tuple(image_hash(*image) for image in document.images) for _, document in pairs]
    return collate_documents([document for _, document in pairs], builder, names) | {
        "samples": [sample for sample, _ in pairs], "hashes": hashes}


def collate_documents(documents: Sequence[Document], builder: DocumentBuilder, names: Sequence[str]) -> Rows:
    """`packing.collate` at the builder's row size."""
    return collate(documents, builder.max_tokens, builder.max_patches, builder.patcher.channels, names)
