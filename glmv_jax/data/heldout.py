"""Held-out data for evaluation: small, in memory, the same on every call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from glmv_jax.data import emoji, questions
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.packing import PackIterDataset
from glmv_jax.data.pipeline import LANGUAGES, Rows, collate_documents, concept_number, pair_text, vision_row
from glmv_jax.data.records import Sample
from glmv_jax.data.stream import Stream
from glmv_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class HeldoutPairs:
    """N image-text pairs of N concepts.

    vision: patches [N,P,C], yx, frame.      texts: "en name", "zh name", "en name+keywords", "zh name+keywords"
    -> tokens int32 [N, Tt].                 concept: int32 [N].
    ids, images, names ({"en": [...], "zh": [...]}): for pictures and tables.
    """

    vision: Rows
    texts: dict[str, np.ndarray]
    concept: np.ndarray
    ids: list[str]
    images: list[Image.Image]
    names: dict[str, list[str]]


def heldout_pairs(tokenizer: Tokenizer, patcher: Patcher, text_length: int = 16, split: str = "heldout",
                  limit: int | None = None) -> HeldoutPairs:
    """The first `limit` (default: all) pairs of concepts that training never shows."""
    pairs = emoji.Pairs(split)
    taken = [pairs[i] for i in range(min(limit or len(pairs), len(pairs)))]
    rows = [vision_row(*patcher(pair.image), patcher.max_patches) for pair in taken]
    texts = {
        f"{lang} {kind}": np.stack([tokenizer.fixed(pair_text(pair.texts[lang], kind), text_length) for pair in taken])
        for lang in LANGUAGES for kind in ("name", "name+keywords")
    }
    return HeldoutPairs(
        vision={name: np.stack([row[name] for row in rows]) for name in rows[0]}, texts=texts,
        concept=np.array([concept_number(pair.id) for pair in taken], np.int32), ids=[pair.id for pair in taken],
        images=[pair.image for pair in taken], names={lang: [p.texts[lang][0] for p in taken] for lang in LANGUAGES})


def heldout_questions(kinds: Sequence[str], n: int, seed: int = 0) -> dict[str, list[Sample]]:
    """`n` held-out samples of each kind."""
    sources = {kind: questions.Questions((kind,), "heldout", seed) for kind in kinds}
    return {kind: [source[i] for i in range(n)] for kind, source in sources.items()}


def packed_batches(samples: Sequence[Sample], builder: DocumentBuilder, form: str, batch: int, names: Sequence[str]
                   ) -> list[Rows]:
    """Samples as packed vlm batches ("pretrain" or "chat"), in order. The last batch may have empty rows."""
    documents = [getattr(builder, form)(sample) for sample in samples]
    return list(iter(PackIterDataset(
        Stream(documents), tokens=builder.max_tokens, patches=builder.max_patches, channels=builder.patcher.channels,
        rows=batch, names=names, log=FaultLog(), targets=builder.max_targets)))


def prompt_chunks(samples: Sequence[Sample], builder: DocumentBuilder, batch: int, names: Sequence[str]
                  ) -> Iterator[tuple[Rows, list[Sample]]]:
    """(prompt batch, its samples) in order; every batch has `batch` rows, in the last one the surplus rows repeat."""
    for start in range(0, len(samples), batch):
        chunk = list(samples[start:start + batch])
        filled = chunk + [chunk[-1]] * (batch - len(chunk))
        yield collate_documents([builder.prompt(sample) for sample in filled], builder, names), chunk
