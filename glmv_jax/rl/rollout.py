"""Rollouts as records: what was asked, what was sampled, how it was graded. A failed one is data, not an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glmv_jax.inference.batches import EngineSampler
from glmv_jax.inference.sampler import Prompts, Sampler, Sampling
from glmv_jax.inference.text import answer_text, behind
from glmv_jax.rl.integrity import check_prompt
from glmv_jax.typing import Batch, Params

if TYPE_CHECKING:  # who trains on rollouts needs no grader; who makes them does, see `rollout`
    from glmv_jax.data.records import Sample
    from glmv_jax.rl.rewards.grade import Grade


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer to one prompt.

    id, source: of the sample.          row: its prompt's row in the prompt batch; rollouts of one row are a group.
    prompt, answer: int32 ids; the answer ends with the stop token unless truncated.
    logprobs: float32, of each answer id under the policy that sampled it (`sampler.Generated.logprobs`).
    text: the answer as the grader saw it.     truncated: no stop token came.
    image_hash: of each image that was seen, as it was made (`data.hashes.image_hash`), with commas between them.

    An episode of several turns (`rl.episodes`) is one answer, of which the environment said a part:
    drawn: bool, which ids of the answer the policy drew; None for all. logprobs are 0 for the others.
    images: (patches, yx) of every image of prompt and answer in reading order; () where they are the prompt batch's.
    versions: int32, of the weights that drew each id, -1 where none did; None where it was one version.
    sample: what was asked; None of an episode.
    """

    id: str
    source: str
    row: int
    prompt: np.ndarray
    answer: np.ndarray
    logprobs: np.ndarray
    text: str
    grade: Grade
    truncated: bool
    image_hash: str
    drawn: np.ndarray | None = None
    images: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    versions: np.ndarray | None = None
    sample: Sample | None = None

    @property
    def own(self) -> np.ndarray:
        """bool, which ids of the answer the policy drew: what is learnt."""
        if self.drawn is not None:
            return self.drawn
        return np.ones(len(self.answer), bool) if self.versions is None else self.versions >= 0

    @property
    def said(self) -> np.ndarray:
        """`logprobs` of what the policy drew."""
        return self.logprobs[self.own]

    def to_json(self) -> dict[str, Any]:
        """The record without its pixels as a JSON-able object, for logs."""
        said = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in vars(self).items()}
        del said["sample"]
        return {**said, "images": len(self.images), "grade": dataclasses.asdict(self.grade)}


def heard(sampling: Sampling, ids: np.ndarray, tokenizer: Any) -> str:
    """The text of an answer that is graded: what is behind its thinking, where it is to think."""
    return answer_text(tokenizer, behind(ids, sampling.close) if sampling.think else ids, sampling.stop)


def versions(sampling: Sampling, ids: np.ndarray, version: int) -> np.ndarray:
    """`Rollout.versions` of an answer that weights of one version drew: -1 where thinking was ended by force."""
    found = np.full(len(ids), version, np.int32)
    if (put := sampling.put_at(ids)) is not None:
        found[put] = -1
    return found


def rollout(
    sampler: Sampler | EngineSampler,
    params: Params,
    batch: Batch,
    key: jax.Array,
    tokenizer: Any,
    score: Callable[[Sequence[Sample], Sequence[str]], list[Grade]],
    sampled: Callable[[], None] | None = None,
    limits: Mapping[str, int] | None = None,
) -> list[Rollout]:
    """Samples `sampler.group` answers to every prompt of `batch` and grades them.

    sampled: called when the answers are there and none has been graded. limits: tokens of an answer by source, where
    they are not the sampler's, which then is an engine's.

    batch: of `rl.prompts` (arrays with one prompt a row, "samples" and "hashes"; rows beyond those only fill it).
    Returns B * group records, groups together.
    score: samples and answers, groups together, to grades; what it raises passes through.
    ValueError: a row does not show its prompt's images (`integrity.check_prompt`).
    """
    hashes = [check_prompt(batch, row) for row in range(len(batch["samples"]))]
    asked = [np.array(ids[:length]) for ids, length in zip(batch["tokens"], batch["length"])]
    each = {}
    if limits:
        each["limits"] = [limits.get(s.source, sampler.sampling.max_new_tokens) for s in batch["samples"]]
    out = jax.device_get(sampler(params, Prompts.of(batch), key, **each))
    if sampled is not None:
        sampled()
    samples = [sample for sample in batch["samples"] for _ in range(sampler.group)]
    answers = [tokens[:length] for tokens, length in zip(out.tokens[: len(samples)], out.lengths)]
    texts = [heard(sampler.sampling, ids, tokenizer) for ids in answers]
    grades = score(samples, texts)
    records = []
    for n, (sample, answer, text, grade) in enumerate(zip(samples, answers, texts, grades)):
        row = n // sampler.group
        records.append(
            Rollout(
                id=sample.id, source=sample.source, row=row,
                prompt=asked[row], answer=answer,
                logprobs=out.logprobs[n, : len(answer)], text=text, grade=grade,
                truncated=not out.finished[n], image_hash=hashes[row], sample=sample,
                versions=versions(sampler.sampling, answer, 0) if sampler.sampling.think else None,
            )
        )  # fmt: skip
    return records
