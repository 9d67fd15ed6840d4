"""Held-out data for evaluation: small, in memory, the same on every call."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import emoji, questions
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.image_text import LANGUAGES, concept_number, pair_text
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.packing import PackIterDataset
from glmv_jax.data.pairs import Source, alike, balance, picture
from glmv_jax.data.pipeline import collate_documents, vision_row
from glmv_jax.data.records import Pair, Sample
from glmv_jax.data.stream import Rows, Stream
from glmv_jax.data.text_rows import TextRows
from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class HeldoutPairs:
    """N image-text pairs; those of the shipped corpus are of N concepts.

    vision: patches [N,P,C], yx, frame.      texts: "en name", "zh name", "en name+keywords", "zh name+keywords"
    -> tokens int32 [N, Tt]; of sources on disk one language, and "name" is the first caption.
    concept: int32 [N], as in training.      ids, images, names ({"en": [...], "zh": [...]}): for pictures and tables.
    """

    vision: Rows
    texts: dict[str, np.ndarray]
    concept: np.ndarray
    ids: list[str]
    images: list[Image.Image]
    names: dict[str, list[str]]


def heldout_pairs(tokenizer: TextRows, patcher: Patcher, text_length: int = 16, split: str = "heldout",
                  limit: int | None = None) -> HeldoutPairs:
    """The first `limit` (default: all) pairs of concepts that training never shows."""
    pairs = emoji.Pairs(split)
    taken = [pairs[i] for i in range(min(limit or len(pairs), len(pairs)))]
    kinds = [(lang, kind) for lang in LANGUAGES for kind in ("name", "name+keywords")]
    return _collected(taken, [concept_number(pair.id) for pair in taken], kinds, tokenizer, patcher, text_length)


def source_pairs(sources: Mapping[str, Source], tokenizer: TextRows, patcher: Patcher, text_length: int = 64, *,
                 share: float, limit: int, log: FaultLog | None = None) -> dict[str, HeldoutPairs]:
    """Up to `limit` pairs a language of those that `image_text.pair_batches` leaves out at this share: language ->
    pairs, the same on every host. A record with both languages is in both.

    Each source gives an equal part. Its files are gone through in an order of their own until that is found.
    Raises: UserError when no language has two of them.
    """
    found: dict[str, list[tuple[Pair, int]]] = {lang: [] for lang in LANGUAGES}
    for name, source in sources.items():
        wanted = {lang: -(-limit // len(sources)) for lang in LANGUAGES if source.lang in ("auto", lang)}
        for pair, number in _held_out(name, source, patcher, share, 4 * sum(wanted.values()), log or FaultLog(None)):
            for lang in wanted.keys() & pair.texts.keys():
                if wanted[lang]:
                    wanted[lang] -= 1
                    found[lang].append((pair, number))
            if not any(wanted.values()):
                break
    sets = {}
    for lang, taken in found.items():
        if len(taken) > 1:
            pairs, numbers = zip(*taken[:limit])
            sets[lang] = _collected(pairs, numbers, [(lang, "name")], tokenizer, patcher, text_length)
    if not sets:
        raise UserError(f"fewer than two pairs of {', '.join(sources)} are held out at data.heldout={share}; raise it")
    return sets


def _held_out(name: str, source: Source, patcher: Patcher, share: float, most: int, log: FaultLog
              ) -> Iterator[tuple[Pair, int]]:
    """Held-out pairs of a source, decoded, and their concepts; `most` at most, broken ones logged and skipped."""
    files = sorted(source.files(), key=lambda path: hashlib.blake2b(os.path.basename(path).encode()).digest())
    for file in files:
        try:
            reader = source.open([file], name, log)
        except UserError as error:
            log.add(name, file, str(error))
            continue
        for i in range(len(reader)):
            if balance.held_out(reader.id(i), share):
                try:
                    pair = reader[i]
                    image = picture.sized(pair.image, patcher)
                except (UserError, OSError, ValueError) as error:
                    log.add(name, reader.id(i), str(error), i)
                    continue
                yield dataclasses.replace(pair, image=image), picture.label(alike(pair, source.alike))
                most -= 1
                if not most:
                    return


def _collected(pairs: Sequence[Pair], concept: Sequence[int], kinds: Sequence[tuple[str, str]], tokenizer: TextRows,
               patcher: Patcher, text_length: int) -> HeldoutPairs:
    rows = [vision_row(*patcher(pair.image), patcher.max_patches) for pair in pairs]
    texts = {f"{lang} {kind}": np.stack([tokenizer.fixed(pair_text(p.texts[lang], kind), text_length) for p in pairs])
             for lang, kind in kinds}
    return HeldoutPairs(
        vision={name: np.stack([row[name] for row in rows]) for name in rows[0]}, texts=texts,
        concept=np.array(concept, np.int32), ids=[pair.id for pair in pairs], images=[pair.image for pair in pairs],
        names={lang: [p.texts[lang][0] for p in pairs] for lang in dict(kinds)})


def _questions(kind: str, split: str, seed: int) -> questions.Questions:
    return questions.Questions((kind,), split, seed)


def heldout_questions(
    kinds: Sequence[str], n: int, seed: int = 0, source: Callable[[str, str, int], Any] = _questions
) -> dict[str, list[Sample]]:
    """`n` held-out samples of each kind. source: (kind, split, seed) -> random access; `rl.tasks.source` has more."""
    sources = {kind: source(kind, "heldout", seed) for kind in kinds}
    return {kind: [source[i] for i in range(n)] for kind, source in sources.items()}


def packed_batches(samples: Sequence[Sample], builder: DocumentBuilder, form: str, batch: int, names: Sequence[str]
                   ) -> list[Rows]:
    """Samples as packed vlm batches ("pretrain" or "chat"), in order. The last batch may have empty rows."""
    documents = [getattr(builder, form)(sample) for sample in samples]
    return list(iter(PackIterDataset(
        Stream(documents), tokens=builder.max_tokens, patches=builder.max_patches, channels=builder.patcher.channels,
        rows=batch, names=names, log=FaultLog(), targets=builder.max_targets, images=builder.max_images)))


def prompt_chunks(samples: Sequence[Sample], builder: DocumentBuilder, batch: int, names: Sequence[str]
                  ) -> Iterator[tuple[Rows, list[Sample]]]:
    """(prompt batch, its samples) in order; every batch has `batch` rows, in the last one the surplus rows repeat."""
    for start in range(0, len(samples), batch):
        chunk = list(samples[start:start + batch])
        filled = chunk + [chunk[-1]] * (batch - len(chunk))
        yield collate_documents([builder.prompt(sample) for sample in filled], builder, names), chunk
