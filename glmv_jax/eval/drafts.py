"""How many tokens a pass of speculative decoding yields: on held-out documents that are cut after their first words.

After pretraining a model is asked to go on with a text, alone or about an image; after SFT, to answer a question. How
far drafts are kept differs between the two, so prompts are of two kinds, "text" and "image".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from glmv_jax.data.building import Document, DocumentBuilder
from glmv_jax.data.packing import collate
from glmv_jax.data.records import Sample
from glmv_jax.inference import acceptance
from glmv_jax.inference.sampler import Prompts
from glmv_jax.inference.speculative import Counts, SpeculativeSampler
from glmv_jax.typing import Params

SHOWN = {"text": 12, "image": 3}  # learnt tokens of a document that its prompt shows, those behind the image
NEW = 32  # tokens of an answer


def cut(document: Document, shown: int) -> Document:
    """A document up to its first `shown` learnt tokens; at least its last token is left to be said."""
    end = min(int(np.argmax(document.loss_weight > 0)) + shown, len(document.tokens) - 1)
    fields = ("tokens", "loss_weight", "image_of_token")
    return dataclasses.replace(document, **{name: getattr(document, name)[:end] for name in fields})


def continued(texts: Sequence[Sample], pictures: Sequence[Sample], builder: DocumentBuilder, form: str
              ) -> dict[str, Prompts]:
    """Prompts by kind, on the host, a row each and all as long as the longest: documents with their end cut off or,
    with form="chat", of pictures the questions about them."""
    documents = {"text": [cut(builder.pretrain(sample), SHOWN["text"]) for sample in texts]}
    if form == "chat":
        documents["image"] = [builder.prompt(sample) for sample in pictures]
    else:
        documents["image"] = [cut(builder.pretrain(sample), SHOWN["image"]) for sample in pictures]
    longest = max(len(document.tokens) for of_kind in documents.values() for document in of_kind)
    return {kind: prompts(of_kind, builder, longest) for kind, of_kind in documents.items() if of_kind}


def prompts(documents: Sequence[Document], builder: DocumentBuilder, length: int) -> Prompts:
    """One row a document, padded to `length` tokens and the builder's patches of an image."""
    p = builder.patcher
    rows = [Prompts.of(collate([x], length, p.max_patches, p.channels, [x.source])) for x in documents]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *rows)


def counts(sampler: SpeculativeSampler, params: Params, asked: Mapping[str, Prompts], seed: int = 1
           ) -> dict[str, Counts]:
    """What the drafts came to, by kind of prompt, all of a kind in one batch."""
    return {
        kind: jax.device_get(sampler(params, rows, jax.random.key(seed)).counts) for kind, rows in asked.items()
    }


def accept_lengths(found: Mapping[str, Counts]) -> dict[str, float]:
    """Tokens a pass, 1 to K + 1, by kind."""
    return {kind: acceptance.accept_length(acceptance.rates(of_kind)) for kind, of_kind in found.items()}
