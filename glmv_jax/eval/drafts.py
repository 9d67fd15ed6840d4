"""How many tokens a pass of speculative decoding yields: on held-out documents that are cut after their first words.

After pretraining a model is asked to go on with a text, alone or about an image; after SFT, to answer a question. How
far drafts are kept differs between the two, so prompts are of two kinds, "text" and "image".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from glmv_jax.data.building import Document, DocumentBuilder
from glmv_jax.data.records import Sample
from glmv_jax.inference import acceptance
from glmv_jax.inference.batches import complete
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.requests import Prompt, Request
from glmv_jax.inference.settings import Counts
from glmv_jax.typing import Params

SHOWN = {"text": 12, "image": 3}  # learnt tokens of a document that its prompt shows, those behind the image
NEW = 32  # tokens of an answer


def cut(document: Document, shown: int) -> Document:
    """A document up to its first `shown` learnt tokens; at least its last token is left to be said."""
    end = min(int(np.argmax(document.loss_weight > 0)) + shown, len(document.tokens) - 1)
    fields = ("tokens", "loss_weight", "image_of_token")
    return dataclasses.replace(document, **{name: getattr(document, name)[:end] for name in fields})


def continued(texts: Sequence[Sample], pictures: Sequence[Sample], builder: DocumentBuilder, form: str
              ) -> dict[str, list[Prompt]]:
    """Prompts by kind: documents with their end cut off or, with form="chat", of pictures the questions about them."""
    documents = {"text": [cut(builder.pretrain(sample), SHOWN["text"]) for sample in texts]}
    if form == "chat":
        documents["image"] = [builder.prompt(sample) for sample in pictures]
    else:
        documents["image"] = [cut(builder.pretrain(sample), SHOWN["image"]) for sample in pictures]
    return {kind: [Prompt.of_document(x) for x in of_kind] for kind, of_kind in documents.items() if of_kind}


def counts(
    engine: Engine, params: Params, asked: Mapping[str, Sequence[Prompt]], seed: int = 1, temperature: float = 0.0
) -> dict[str, Counts]:
    """What the engine did, by kind of prompt."""
    found = {}
    for kind, prompts in asked.items():
        before = engine.counts.copy()
        complete(engine, params, [Request(x, seed, n, temperature=temperature) for n, x in enumerate(prompts)])
        found[kind] = engine.counts.since(before)
    return found


def accept_lengths(found: Mapping[str, Counts]) -> dict[str, float]:
    """Tokens a pass, 1 to K + 1, by kind."""
    return {kind: acceptance.accept_length(acceptance.rates(of_kind)) for kind, of_kind in found.items()}
