"""Rollouts as records: what was asked, what was sampled, how it was graded. A failed one is data, not an error."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glmv_jax.inference.sampler import Prompts, Sampler
from glmv_jax.inference.text import answer_text
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
    image_hash: of the pixels the prompt was answered from (`image_hash`), "" without an image.

    An episode of several turns (`rl.episodes`) is one answer, of which the environment said a part:
    drawn: bool, which ids of the answer the policy drew; None for all. logprobs are 0 for the others.
    images: (patches, yx) of every image of prompt and answer in reading order, whose hashes `image_hash` has, with
    commas between them; () where the image is that of the prompt batch.
    versions: int32, of the weights that drew each id, -1 where none did; None where it was one version.
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

    @property
    def said(self) -> np.ndarray:
        """`logprobs` of what the policy drew."""
        return self.logprobs if self.drawn is None else self.logprobs[self.drawn]

    def to_json(self) -> dict[str, Any]:
        """The record without its pixels as a JSON-able object, for logs."""
        said = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in vars(self).items()}
        return {**said, "images": len(self.images), "grade": dataclasses.asdict(self.grade)}


def image_hash(patches_PC: np.ndarray, yx_P2: np.ndarray) -> str:
    """Hash of the patches of a prompt and their coordinates, padding left out; "" when there are none."""
    if not len(patches_PC):
        return ""
    digest = hashlib.blake2b(np.ascontiguousarray(patches_PC), digest_size=8)
    digest.update(np.ascontiguousarray(yx_P2, np.int32))
    return digest.hexdigest()


def rollout(
    sampler: Sampler,
    params: Params,
    batch: Batch,
    key: jax.Array,
    tokenizer: Any,
    score: Callable[[Sequence[Sample], Sequence[str]], list[Grade]],
    sampled: Callable[[], None] | None = None,
) -> list[Rollout]:
    """Samples `sampler.group` answers to every prompt of `batch` and grades them.

    sampled: called when the answers are there and none has been graded.

    batch: of `rl.prompts` (arrays with one prompt a row, and "samples"). Returns B * group records, groups together.
    score: samples and answers, groups together, to grades; what it raises passes through.
    """
    out = jax.device_get(sampler(params, Prompts.of(batch), key))
    if sampled is not None:
        sampled()
    samples = [sample for sample in batch["samples"] for _ in range(sampler.group)]
    answers = [tokens[:length] for tokens, length in zip(out.tokens, out.lengths)]
    texts = [answer_text(tokenizer, ids, sampler.sampling.stop) for ids in answers]
    grades = score(samples, texts)
    hashes = []
    for patches, yx, frame in zip(batch["patches"], batch["yx"], batch["frame"]):
        hashes.append(image_hash(patches[frame > 0], yx[frame > 0]))
    records = []
    for n, (sample, answer, text, grade) in enumerate(zip(samples, answers, texts, grades)):
        row = n // sampler.group
        records.append(
            Rollout(
                id=sample.id, source=sample.source, row=row,
                prompt=np.asarray(batch["tokens"][row][: batch["length"][row]]), answer=answer,
                logprobs=out.logprobs[n, : len(answer)], text=text, grade=grade,
                truncated=not out.finished[n], image_hash=hashes[row],
            )
        )  # fmt: skip
    return records
