"""Answers of a public checkpoint: a prompt of ids and images, the ids that follow and how likely each was."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from jax.sharding import Mesh

from glmv_jax.data.building import Document
from glmv_jax.data.processor import Processor
from glmv_jax.inference.generate import check_settings, complete
from glmv_jax.inference.sampler import Sampling
from glmv_jax.inference.text import answer_text
from glmv_jax.models import vlm
from glmv_jax.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Reply:
    """token_ids: those after the prompt, the one that ends it included. logprobs: of each, before any truncation, at
    the sampling's temperature (greedy: 1). finished: false when max_new_tokens cut it off."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


def check_length(processor: Processor, prompt: Document, max_new_tokens: int) -> None:
    """UserError when prompt and answer exceed the positions that the model was made for."""
    length = len(prompt.tokens)
    if length + max_new_tokens > processor.longest:
        raise UserError(f"the prompt has {length} tokens and up to {max_new_tokens} may follow, but the model was made "
                        f"for {processor.longest}; shorten the prompt or lower --max-new-tokens")


def reply(
    cfg: vlm.VLMConfig, params: Params, processor: Processor, prompt: Document, *,
    max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0, drafts: int = 0,
    mesh: Mesh | None = None,
) -> Reply:  # fmt: skip
    """What the model says next. Nothing is suppressed: greedy ids are those of transformers' `generate`. mesh: as
    `generate`.

    Raises UserError for a prompt and an answer that exceed the model's positions, images that a model of text alone is
    given, and settings out of range.
    """
    check_settings(max_new_tokens, temperature, drafts)
    check_length(processor, prompt, max_new_tokens)
    sampling = Sampling(max_new_tokens, temperature=temperature, stop=processor.stops)
    out = complete(cfg, params, prompt, sampling, seed=seed, drafts=drafts, mesh=mesh)
    logprobs = np.asarray(out.logprobs, np.float64)
    return Reply(out.tokens.tolist(), logprobs.tolist(), out.reason == "stop")


def text_of(answer: Reply, processor: Processor) -> str | None:
    """The text of an answer; None for a checkpoint without a tokenizer."""
    if processor.tokenizer is None:
        return None
    return answer_text(processor.tokenizer, answer.token_ids, processor.stops)


def as_json(answer: Reply, processor: Processor) -> str:
    """One object: token_ids, logprobs, finished, text."""
    return json.dumps(dataclasses.asdict(answer) | {"text": text_of(answer, processor)}, ensure_ascii=False)


def as_text(answer: Reply, processor: Processor) -> str:
    """The text, then ids and log-probabilities, a line each."""
    text = text_of(answer, processor)
    lines = [] if text is None else [text]
    lines.append("token ids: " + ",".join(map(str, answer.token_ids)))
    lines.append("logprobs: " + ",".join(f"{x:.4f}" for x in answer.logprobs))
    return "\n".join(lines)
