"""Batches of stage 2: image-text pairs, of the shipped corpus or of sources on disk, at NaFlex lengths.

The arrays of a batch are in the head of `pipeline`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from glmv_jax.data import emoji, pairs
from glmv_jax.data.basics import Basics
from glmv_jax.data.basics import number as basics_number
from glmv_jax.data.faults import Guarded, LeftOut
from glmv_jax.data.mixture import Mixture
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.pairs import balance, picture
from glmv_jax.data.pipeline import ALONE, Reading, vision_row
from glmv_jax.data.records import Pair
from glmv_jax.data.schedule import Schedule
from glmv_jax.data.stream import Batches, Rows, Stream, UniqueBatchIterDataset, Workers
from glmv_jax.data.text_rows import TextRows
from glmv_jax.typing import UserError

LANGUAGES = emoji.LANGUAGES
SHIPPED = ("emoji", "basics")  # sources of pairs


def siglip_batches(
    pairs: Any, tokenizer: TextRows, patcher: Patcher, *, batch: int, lengths: Mapping[int, float] | None = None,
    text_length: int = 16, chinese: float | None = None, texts: Mapping[str, float] | None = None, basics: float = 0.0,
    reading: Reading = ALONE,
) -> Batches:
    """Image-text pairs, no emoji twice in a batch. `source` in a batch counts in SHIPPED.

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

    def rows(length: int, reading: Reading) -> Guarded:
        own = {"emoji": _ConceptEpochs(pairs, reading), "basics": Basics(reading.seed * reading.shards + reading.shard)}
        order = Mixture(own, {"emoji": 1.0 - basics, "basics": basics})
        row = functools.partial(transform, patcher=dataclasses.replace(patcher, max_patches=length))
        return reading.guarded(order, row, "pairs")

    return _of_lengths(rows, lengths or {patcher.max_patches: 1.0}, reading, batch, below=len(emoji.load()))


def _of_lengths(rows: Callable[[int, Reading], Any], lengths: Mapping[int, float], reading: Reading, batch: int,
                below: int) -> Batches:
    """Batches of image rows of one length, which changes from batch to batch and is the same on every host.

    Each length goes through the pairs in an order of its own; the same processes make the rows of all.
    below: see `UniqueBatchIterDataset`.
    """
    workers, shares = Workers(reading.workers), {str(length): share for length, share in lengths.items()}
    made = {str(length): rows(length, dataclasses.replace(reading, seed=reading.seed + 7919 * n))
            for n, length in enumerate(lengths)}
    streams = {length: UniqueBatchIterDataset(Stream(items, workers, chunk=32), batch, "concept", below=below)
               for length, items in made.items()}
    batches = Schedule(streams, shares, reading.seed) if len(streams) > 1 else next(iter(streams.values()))
    return reading.iterator(batches, Mixture(made, shares))


def pair_batches(
    sources: Mapping[str, pairs.Source], tokenizer: TextRows, patcher: Patcher, *, batch: int,
    lengths: Mapping[int, float] | None = None, text_length: int = 64, chinese: float | None = 0.5,
    heldout: float = 0.0, unseen: Collection[int] = (), reading: Reading = ALONE,
) -> Batches:
    """Image-text pairs of sources on disk, in the form of `siglip_batches`. A record may come twice in a batch.

    `concept` is a hash of the picture (or of the text, where a source says so): pairs of one picture are no negatives
    of each other, on whatever hosts they are. Pairs of different pictures with the same text are, as in SigLIP.
    chinese: share of Chinese rows, one text an image; None: a text in both languages, of records that have both.
    heldout: share of records that is never trained on (`heldout.source_pairs`). `source` in a batch counts in sources.
    unseen: concepts of pictures that are not trained on in whatever record they are: those of the evaluation, which
        data with a record a caption would show in others.
    """
    parts = balance.opened(sources, reading.shard, reading.shards, reading.log)
    balanced = balance.Balanced(parts, chinese, heldout)

    def rows(length: int, reading: Reading) -> Mixture:
        own = dataclasses.replace(patcher, max_patches=length)

        def guard(order: balance.Order, langs: tuple[str, ...], name: str) -> Guarded:
            row = functools.partial(_pair_row, langs=langs, alike=sources[name].alike, tokenizer=tokenizer, patcher=own,
                                    length=text_length, unseen=frozenset(unseen), source=list(sources).index(name))
            return reading.guarded(order, row, name, records=len(order.reader))

        return balanced.mixed(reading.seed, guard)

    return _of_lengths(rows, lengths or {patcher.max_patches: 1.0}, reading, batch, below=0)


def _pair_row(ref: balance.Ref, rng: np.random.Generator, *, langs: tuple[str, ...], alike: str, tokenizer: TextRows,
              patcher: Patcher, length: int, unseen: frozenset[int], source: int) -> Rows:
    pair = ref.reader[ref.index]
    concept = picture.label(pairs.alike(pair, alike))
    if alike == "image" and concept in unseen:
        raise LeftOut("its picture is held out, under another id")
    texts = [pair.texts[lang][rng.integers(len(pair.texts[lang]))] for lang in langs]
    tokens, segments = tokenizer.side_by_side(texts, length)
    return vision_row(*patcher(picture.sized(pair.image, patcher)), patcher.max_patches) | {
        "tokens": tokens, "segments": segments, "concept": np.int32(concept), "source": np.int32(source),
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
        "source": np.int32(SHIPPED.index(pair.source)), "lang": np.array(langs, np.int32)}


def pair_text(texts: Sequence[str], kind: str, rng: np.random.Generator | None = None) -> str:
    """A text of a pair. With `rng` one or more of the keywords, in any order; without it all, in theirs."""
    name, keywords = texts[0], list(texts[1:])
    if rng is not None and keywords:
        keywords = [keywords[i] for i in rng.permutation(len(keywords))[: rng.integers(1, len(keywords) + 1)]]
    if kind == "name" or not keywords:
        return name
    return ", ".join(keywords if kind == "keywords" else [name, *keywords])
