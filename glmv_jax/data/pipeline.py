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
             source [B,T] i32 (index among the sources, -1 padding), patches, yx, frame (unique in its row)
    prompts  the vlm arrays with one prompt a row, and length [B] i32, next_position [B] i32 (`packing.collate`),
             samples: the list of B `records.Sample`

Sharding: shard s of n reads its own part of every source (stage 2: its own concepts), so shards never share a record
within an epoch. `batch` counts the rows of one shard.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from glmv_jax.data import emoji, features, masks, pairs
from glmv_jax.data.basics import Basics
from glmv_jax.data.basics import number as basics_number
from glmv_jax.data.building import Document, DocumentBuilder
from glmv_jax.data.faults import FaultLog, Guarded, LeftOut
from glmv_jax.data.files import crop_box, cropped
from glmv_jax.data.mixture import Mixture
from glmv_jax.data.naflex import Patcher, patchify, to_rgb
from glmv_jax.data.packing import PackIterDataset, collate
from glmv_jax.data.pairs import balance, picture
from glmv_jax.data.records import Pair, Sample
from glmv_jax.data.schedule import Schedule
from glmv_jax.data.seeds import generator
from glmv_jax.data.stream import Rows, Stream, UniqueBatchIterDataset, Workers, prefetched
from glmv_jax.data.text_rows import TextRows
from glmv_jax.typing import UserError

LANGUAGES = emoji.LANGUAGES


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

    def __post_init__(self):
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

    def guarded(self, source: Any, transform: Any, name: str) -> Guarded:
        """A source with its transform, broken records replaced."""
        return Guarded(source, transform, name=name, seed=self.seed, log=self.log)

    def iterator(self, batches: grain.IterDataset) -> grain.DatasetIterator:
        """The batches, made ahead if wished."""
        return prefetched(batches, self.ahead) if self.ahead else iter(batches)


def vision_row(patches_PC: np.ndarray, yx_P2: np.ndarray, budget: int) -> Rows:
    """One image padded to the budget: patches, yx and frame (1, and 0 on padding)."""
    count, channels = patches_PC.shape
    if count > budget:
        raise UserError(f"an image of {count} patches does not fit a row of {budget}; raise the patch budget")
    row = {"patches": np.zeros((budget, channels), np.uint8), "yx": np.zeros((budget, 2), np.int32),
           "frame": np.zeros(budget, np.int32)}
    row["patches"][:count], row["yx"][:count], row["frame"][:count] = patches_PC, yx_P2, 1
    return row


# ------------------------------------------------------------------------------------------------------ stage 1: mim


@dataclasses.dataclass(frozen=True)
class Stored:
    """A cache of teachers' features as the source of a batch's `features`. names: of the teachers that are read."""

    cache: features.FeatureCache
    names: tuple[str, ...]
    split: str = "train"


def mim_batches(
    sources: Mapping[str, Any], weights: Mapping[str, float], *, batch: int, size: int = 64, patch: int = 8,
    merge: int = 2, mask_ratio: float = 0.35, mask_kind: str = "blockwise",
    crop_scale: tuple[float, float] = (1.0, 1.0), reading: Reading = Reading(), keys: bool = False,
    stored: Stored | None = None,
) -> grain.DatasetIterator:
    """Masked crops of size x size pixels. sources: name -> random access of (id, PIL image).

    mask_kind: "blockwise" or "random". crop_scale: shares of an image's area that are cropped, see `files.random_crop`.
    keys: rows also hold key [B, 64] and id [B], see `features.key`. stored: features come from there; when its crops
    are used up they come again in the same order with new masks.
    """
    if mask_kind not in ("blockwise", "random"):
        raise UserError(f"unknown kind of mask {mask_kind!r}; choose blockwise or random")
    mask = _Mask(mask_kind, size // patch, masks.count_for(mask_ratio, size // patch, size // patch))
    transform = functools.partial(_mim_row, size=size, scale=tuple(crop_scale), patch=patch, merge=merge, mask=mask,
                                  keys=keys or stored is not None)
    names = list(sources)
    rows = {name: reading.guarded(reading.endless(source), functools.partial(transform, source=names.index(name)), name)
            for name, source in sources.items()}
    crops: Any = Mixture(rows, weights)
    if stored is not None:
        stored.cache.check_whole(stored.split, reading.shard)
        crops = _Again(crops, stored.cache.items[stored.split], mask, reading.seed)
    batches: Any = Stream(grain.MapDataset.source(crops).batch(batch, drop_remainder=True), reading.workers)
    if stored is not None:
        batches = features.WithFeatures(batches, stored.cache, stored.names, stored.split, reading.shard)
    return reading.iterator(batches)


@dataclasses.dataclass(frozen=True)
class _Mask:
    kind: str
    side: int
    count: int

    def __call__(self, rng: np.random.Generator, yx_P2: np.ndarray) -> np.ndarray:
        """[P] bool in the order of the row."""
        return masks.in_row_order(getattr(masks, self.kind)(rng, self.side, self.side, self.count), yx_P2)


@dataclasses.dataclass(frozen=True)
class _Again:
    """The first `count` rows over and over, with their position; masks are drawn anew from the second time on."""

    rows: Mixture
    count: int
    mask: _Mask
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Rows:
        row = self.rows[k % self.count]
        if k >= self.count:
            row = row | {"mask": self.mask(generator(self.seed, "mask", k), row["yx"])}
        return row | {"position": np.int64(k % self.count)}


def _mim_row(record: tuple[str, Image.Image], rng: np.random.Generator, *, size: int, scale: tuple[float, float],
             patch: int, merge: int, mask: _Mask, source: int, keys: bool) -> Rows:
    picture = to_rgb(record[1])
    box = crop_box(picture.size, rng, scale)
    pixels = np.asarray(cropped(picture, box, size))
    patches, yx = patchify(pixels, patch, merge)
    row = vision_row(patches, yx, len(patches)) | {
        "mask": mask(rng, yx), "image": pixels, "source": np.int32(source)}
    if keys:
        row |= {"key": features.key(record[0], source, box, picture.size, pixels),
                "id": np.bytes_(record[0].encode(errors="surrogateescape"))}
    return row


# --------------------------------------------------------------------------------------------------- stage 2: siglip


def siglip_batches(
    pairs: Any, tokenizer: TextRows, patcher: Patcher, *, batch: int, lengths: Mapping[int, float] | None = None,
    text_length: int = 16, chinese: float | None = None, texts: Mapping[str, float] | None = None, basics: float = 0.0,
    reading: Reading = Reading(),
) -> grain.DatasetIterator:
    """Image-text pairs, no emoji twice in a batch.

    pairs: endless random access where index i shows emoji i mod n (`emoji.Pairs`).
    lengths: patches of an image row -> how often; each batch has one of them, the same on every host. None: always
        the budget of `patcher`.
    basics: share of the pairs of `basics.Basics`. There are few of those, so they do repeat in a batch; the loss leaves
        out pairs of one concept.
    chinese: share of Chinese rows, one text an image; None: each image has a text in both languages.
    texts: shares of "name", "name+keywords" (some of them) and "keywords" (some, without the name).
    """
    texts = dict(texts or {"name": 0.5, "name+keywords": 0.3, "keywords": 0.2})
    if set(texts) - set(_TEXTS):
        raise UserError(f"unknown kind of text {min(set(texts) - set(_TEXTS))!r}; choose from {', '.join(_TEXTS)}")
    concepts = _ConceptEpochs(pairs, reading).concepts
    if batch > concepts:
        raise UserError(f"a batch of {batch} needs as many concepts, this shard has {concepts}; lower the batch")
    shares = np.array([texts.get(kind, 0.0) for kind in _TEXTS])
    transform = functools.partial(_siglip_row, tokenizer=tokenizer, length=text_length, chinese=chinese,
                                  shares=np.cumsum(shares / shares.sum()))

    def batches(length: int, reading: Reading, workers: Workers) -> grain.IterDataset:
        order: Any = _ConceptEpochs(pairs, reading)
        if basics:
            own = Basics(reading.seed * reading.shards + reading.shard)
            order = Mixture({"emoji": order, "basics": own}, {"emoji": 1.0 - basics, "basics": basics})
        row = functools.partial(transform, patcher=dataclasses.replace(patcher, max_patches=length))
        rows = Stream(reading.guarded(order, row, "pairs"), workers, chunk=32)
        return UniqueBatchIterDataset(rows, batch, "concept", below=len(emoji.load()))

    return _of_lengths(batches, lengths or {patcher.max_patches: 1.0}, reading)


def _of_lengths(batches: Callable[[int, Reading, Workers], grain.IterDataset], lengths: Mapping[int, float],
                reading: Reading) -> grain.DatasetIterator:
    """Batches of image rows of one length, which changes from batch to batch and is the same on every host.

    Each length goes through the pairs in an order of its own; the same processes make the rows of all.
    """
    workers = Workers(reading.workers)
    streams = {str(length): batches(length, dataclasses.replace(reading, seed=reading.seed + 7919 * n), workers)
               for n, length in enumerate(lengths)}
    if len(streams) == 1:
        return reading.iterator(*streams.values())
    return reading.iterator(Schedule(streams, {str(length): share for length, share in lengths.items()}, reading.seed))


def pair_batches(
    sources: Mapping[str, pairs.Source], tokenizer: TextRows, patcher: Patcher, *, batch: int,
    lengths: Mapping[int, float] | None = None, text_length: int = 64, chinese: float | None = 0.5,
    heldout: float = 0.0, unseen: Collection[int] = (), reading: Reading = Reading(),
) -> grain.DatasetIterator:
    """Image-text pairs of sources on disk, in the form of `siglip_batches`. A record may come twice in a batch.

    `concept` is a hash of the picture (or of the text, where a source says so): pairs of one picture are no negatives
    of each other, on whatever hosts they are. Pairs of different pictures with the same text are, as in SigLIP.
    chinese: share of Chinese rows, one text an image; None: a text in both languages, of records that have both.
    heldout: share of records that is never trained on (`heldout.source_pairs`).
    unseen: concepts of pictures that are not trained on in whatever record they are: those of the evaluation, which
        data with a record a caption would show in others.
    """
    parts = balance.opened(sources, reading.shard, reading.shards, reading.log)
    balanced = balance.Balanced(parts, chinese, heldout)

    def batches(length: int, reading: Reading, workers: Workers) -> grain.IterDataset:
        own = dataclasses.replace(patcher, max_patches=length)

        def guard(order: balance.Order, langs: tuple[str, ...], name: str) -> Guarded:
            row = functools.partial(_pair_row, langs=langs, alike=sources[name].alike, tokenizer=tokenizer, patcher=own,
                                    length=text_length, unseen=frozenset(unseen))
            return reading.guarded(order, row, name)

        rows = Stream(balanced.mixed(reading.seed, guard), workers, chunk=32)
        return UniqueBatchIterDataset(rows, batch, "concept", below=0)

    return _of_lengths(batches, lengths or {patcher.max_patches: 1.0}, reading)


def _pair_row(ref: balance.Ref, rng: np.random.Generator, *, langs: tuple[str, ...], alike: str, tokenizer: TextRows,
              patcher: Patcher, length: int, unseen: frozenset[int]) -> Rows:
    pair = ref.reader[ref.index]
    concept = picture.label(pairs.alike(pair, alike))
    if alike == "image" and concept in unseen:
        raise LeftOut("its picture is held out, under another id")
    texts = [pair.texts[lang][rng.integers(len(pair.texts[lang]))] for lang in langs]
    tokens, segments = tokenizer.side_by_side(texts, length)
    return vision_row(*patcher(picture.sized(pair.image, patcher)), patcher.max_patches) | {
        "tokens": tokens, "segments": segments, "concept": np.int32(concept),
        "lang": np.array([LANGUAGES.index(lang) for lang in langs], np.int32)}


class _ConceptEpochs:
    """This shard's concepts, all once an epoch in a new order: index i is (epoch, place in the epoch)."""

    def __init__(self, pairs: Any, reading: Reading):
        self.pairs, self.seed = pairs, reading.seed
        numbers = [concept_number(emoji.load()[i].id) for i in pairs.indices]
        self.members = [j for j, number in enumerate(numbers) if number % reading.shards == reading.shard]
        self.concepts = len({numbers[j] for j in self.members})

    def __len__(self) -> int:
        return len(self.pairs) // len(self.pairs.indices) * len(self.members)

    def __getitem__(self, i: int) -> Pair:
        epoch, place = divmod(i, len(self.members))
        place = grain.experimental.index_shuffle(
            place, max_index=len(self.members) - 1, seed=(self.seed + epoch) % 2**32, rounds=4)
        return self.pairs[epoch * len(self.pairs.indices) + self.members[place]]


@functools.cache
def _concept_numbers() -> dict[str, int]:
    concepts = sorted({e.concept for e in emoji.load()})
    place = {concept: number for number, concept in enumerate(concepts)}
    return {e.id: place[e.concept] for e in emoji.load()}


def concept_number(id_: str) -> int:
    """The number of an emoji's concept: emoji that differ only in gender or direction share it."""
    return _concept_numbers()[id_]


def _pair_number(pair: Pair) -> int:
    """A concept of the emoji, of which there are fewer than emoji, or beyond those one of the basics."""
    return concept_number(pair.id) if pair.source == "emoji" else len(emoji.load()) + basics_number(pair.id)


_TEXTS = ("name", "name+keywords", "keywords")


def _siglip_row(pair: Pair, rng: np.random.Generator, *, tokenizer: TextRows, patcher: Patcher, length: int,
                chinese: float | None, shares: np.ndarray) -> Rows:
    langs = range(len(LANGUAGES)) if chinese is None else [int(rng.random() < chinese)]
    texts = []
    for lang in langs:
        kind = _TEXTS[min(int(np.searchsorted(shares, rng.random(), side="right")), 2)]
        texts.append(pair_text(pair.texts[LANGUAGES[lang]], kind, rng))
    tokens, segments = tokenizer.side_by_side(texts, length)
    return vision_row(*patcher(pair.image), patcher.max_patches) | {
        "tokens": tokens, "segments": segments, "concept": np.int32(_pair_number(pair)),
        "lang": np.array(langs, np.int32)}


def pair_text(texts: Sequence[str], kind: str, rng: np.random.Generator | None = None) -> str:
    """A text of a pair. With `rng` one or more of the keywords, in any order; without it all, in theirs."""
    name, keywords = texts[0], list(texts[1:])
    if rng is not None and keywords:
        keywords = [keywords[i] for i in rng.permutation(len(keywords))[: rng.integers(1, len(keywords) + 1)]]
    if kind == "name" or not keywords:
        return name
    return ", ".join(keywords if kind == "keywords" else [name, *keywords])


# --------------------------------------------------------------------------- stages 3 to 5: pretrain, sft, rl prompts


def vlm_batches(
    sources: Mapping[str, Any], weights: Mapping[str, float], builder: DocumentBuilder, *, form: str, batch: int,
    reading: Reading = Reading(),
) -> grain.DatasetIterator:
    """Packed rows of builder.max_tokens tokens and builder.max_patches patches.

    sources: name -> random access of `Sample`; their names are what `source` counts in. form: "pretrain" or "chat".
    """
    if form not in ("pretrain", "chat"):
        raise UserError(f"unknown document form {form!r}; choose pretrain or chat")
    names = list(sources)
    documents = {name: reading.guarded(reading.endless(source), _Build(builder, form, name), name)
                 for name, source in sources.items()}
    stream = Stream(Mixture(documents, weights), reading.workers, chunk=32)
    return reading.iterator(PackIterDataset(
        stream, tokens=builder.max_tokens, patches=builder.max_patches, channels=builder.patcher.channels,
        rows=batch, names=names, log=reading.log, targets=builder.max_targets))


def prompt_batches(
    sources: Mapping[str, Any], weights: Mapping[str, float], builder: DocumentBuilder, *, batch: int,
    reading: Reading = Reading(),
) -> grain.DatasetIterator:
    """Questions to sample answers for, one a row, with the samples they come from."""
    names = list(sources)
    pairs = {name: reading.guarded(reading.endless(source), _Build(builder, "prompt", name, keep=True), name)
             for name, source in sources.items()}
    collated = functools.partial(_collate_prompts, builder=builder, names=names)
    items = grain.MapDataset.source(Mixture(pairs, weights)).batch(batch, drop_remainder=True, batch_fn=collated)
    return reading.iterator(Stream(items, reading.workers))


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
    return collate_documents([document for _, document in pairs], builder, names) | {
        "samples": [sample for sample, _ in pairs]}


def collate_documents(documents: Sequence[Document], builder: DocumentBuilder, names: Sequence[str]) -> Rows:
    """`packing.collate` at the builder's row size."""
    return collate(documents, builder.max_tokens, builder.max_patches, builder.patcher.channels, names)
