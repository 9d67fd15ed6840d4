"""Rollouts as records: what was asked, what was sampled, how it was graded. A failed one is data, not an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glmv_jax.inference.sampler import Generated, Prompts, Sampler, Sampling
from glmv_jax.inference.text import answer_text, behind
from glmv_jax.rl.integrity import check_prompt
from glmv_jax.typing import Batch, Params

if TYPE_CHECKING:  # who trains on rollouts needs no grader; who makes them does, see `rollout`
    from glmv_jax.data.records import Sample
    from glmv_jax.rl.rewards.grade import Grade


PROMPT = Prompts._fields[1:]


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


@dataclasses.dataclass(frozen=True)
class Long:
    """Kinds whose answers are written apart, in rows of their own: those of the others need not wait for them.

    sampler: of the same group, with answers as long as these kinds need. prompts: how many it takes at a time.
    """

    sampler: Sampler
    kinds: frozenset[str]
    prompts: int


def drawn(sampler: Sampler, long: Long, params: Params, batch: Batch, key: jax.Array) -> Generated:
    """What `sampler` gives for a batch of prompts (arrays of the host), but for the kinds of `long` what its gives."""
    (chosen,) = np.nonzero([sample.source in long.kinds for sample in batch["samples"]])
    others = batch | {"length": np.where(np.isin(np.arange(len(batch["length"])), chosen), 0, batch["length"])}
    found = jax.device_get(sampler(params, Prompts.of(others), key))
    width = ((0, 0), (0, long.sampler.sampling.max_new_tokens - sampler.sampling.max_new_tokens))
    tokens = np.pad(found.tokens, width, constant_values=sampler.sampling.pad)
    whole = Generated(tokens, np.pad(found.logprobs, width), np.array(found.lengths), np.array(found.finished))
    for n in range(0, len(chosen), long.prompts):
        at = chosen[n : n + long.prompts]
        rows = {name: batch[name][np.resize(at, long.prompts)] for name in ("patches", "yx", "frame", *PROMPT)}
        rows["length"][len(at) :] = 0  # these only fill
        part = jax.device_get(long.sampler(params, Prompts.of(rows), jax.random.fold_in(key, 1 + n)))
        to = (at[:, None] * sampler.group + np.arange(sampler.group)).reshape(-1)
        for into, new in zip(whole, part):
            into[to] = new[: len(to)]
    return whole


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
    sampler: Sampler,
    params: Params,
    batch: Batch,
    key: jax.Array,
    tokenizer: Any,
    score: Callable[[Sequence[Sample], Sequence[str]], list[Grade]],
    sampled: Callable[[], None] | None = None,
    long: Long | None = None,
) -> list[Rollout]:
    """Samples `sampler.group` answers to every prompt of `batch` and grades them.

    sampled: called when the answers are there and none has been graded. long: kinds that are written apart.

    batch: of `rl.prompts` (arrays with one prompt a row, "samples" and "hashes"; rows beyond those only fill it).
    Returns B * group records, groups together.
    score: samples and answers, groups together, to grades; what it raises passes through.
    ValueError: a row does not show its prompt's images (`integrity.check_prompt`).
    """
    hashes = [check_prompt(batch, row) for row in range(len(batch["samples"]))]
    asked = [np.array(ids[:length]) for ids, length in zip(batch["tokens"], batch["length"])]
    if long is None:
        out = jax.device_get(sampler(params, Prompts.of(batch), key))
    else:
        out = drawn(sampler, long, params, batch, key)
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
