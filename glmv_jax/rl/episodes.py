"""Episodes of several turns as records and as packed training rows.

A record is a `rollout.Rollout` whose answer is all that follows the first observation: what the model drew and what the
environment said in between, pictures included. In a row it is one text with all of its images, learnt where it was
drawn; a group's common beginning is there once for each, which `batch.to_batch` spares answers of one turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from glmv_jax.data import balancing
from glmv_jax.data.building import Document
from glmv_jax.data.packing import Loads, Row, loads
from glmv_jax.rl.batch import EVEN, stacked
from glmv_jax.rl.integrity import MERGE, Shown
from glmv_jax.rl.play import Episode
from glmv_jax.rl.rewards.grade import MIN_REWARD, Grade
from glmv_jax.rl.rollout import Rollout
from glmv_jax.typing import Batch, UserError


def verdict(episode: Episode) -> Grade:
    """The grade of an episode by its environment's own reward, which is cut to [0, 1]; 1 is right."""
    if episode.reward is None:
        return Grade(MIN_REWARD, False, {}, ("no_reward",))
    reward = min(1.0, max(0.0, episode.reward))
    return Grade(reward, episode.reward >= 1.0, {"environment": reward}, (episode.ended,) * (episode.ended != "done"))


def record(episode: Episode, grade: Grade, row: int) -> Rollout:
    """An episode as a rollout. row: its group's number. UserError for one in which nothing was drawn."""
    script = episode.transcript
    if not script.drawn.any():
        raise UserError(f"episode {episode.seed} of {episode.source} has no answer ({episode.ended}); drop it")
    first = int(np.argmax(script.drawn))
    drawn = script.drawn[first:]
    return Rollout(
        id=f"{episode.source}/{episode.seed}", source=episode.source, row=row,
        prompt=script.tokens[:first], answer=script.tokens[first:], logprobs=script.logprobs[first:],
        text=episode.text, grade=grade, truncated=int(script.tokens[-1]) not in script.form.tokenizer.stops,
        image_hash=",".join(script.hashes), drawn=drawn, images=tuple(script.images), versions=script.versions[first:],
    )  # fmt: skip


def document(rollout: Rollout, image: int, per: str = "rollout") -> Document:
    """The record as one text. image: the id of `<|image|>`. per: see `batch.to_batch`.

    An image token that the model drew shows nothing; those that were written for images are as many as their visual
    tokens, or ValueError.
    """
    tokens = np.concatenate([rollout.prompt, rollout.answer])
    drawn = np.concatenate([np.zeros(len(rollout.prompt), bool), rollout.drawn])
    places = np.flatnonzero((tokens == image) & ~drawn)
    sizes = [len(patches) // MERGE for patches, _ in rollout.images]
    if len(places) != sum(sizes):
        raise ValueError(f"rollout {rollout.id}: {len(places)} image tokens but images of {sum(sizes)}; drop it whole")
    of = np.full(len(tokens), -1, np.int32)
    of[places] = np.repeat(np.arange(len(sizes)), sizes)
    weight = drawn / (drawn.sum() if per == "rollout" else 1.0)
    return Document(tokens, weight.astype(np.float32), of, rollout.images, rollout.source, rollout.id)


def to_rows(
    records: Sequence[Rollout],
    advantages_N: np.ndarray,
    *,
    rows: Sequence[int],
    tokens: int,
    patches: int,
    channels: int,
    image: int,
    names: Sequence[str],
    targets: int | None = None,
    images: int | None = None,
    per: str = "rollout",
) -> tuple[Batch, int]:
    """Packed rows as `batch.to_batch` makes them, each record one text; and how many records found no room.

    Args: see `batch.to_batch`; channels: of a patch vector; image: the id of `<|image|>`.
    Raises:
      UserError: a record is longer than a row.
      ValueError: a record does not name the images that it has.
    """
    texts = [document(rollout, image, per) for rollout in records]
    shape = (tokens, patches, channels, targets, images)
    for text in texts:
        if not Row(*shape).fits(text):
            raise UserError(f"rollout {text.id}: {len(text.tokens)} tokens, {text.patches} patches, {text.targets} "
                            f"drawn ones and {len(text.images)} images do not fit a row; enlarge it")  # fmt: skip
    loads_ND = np.reshape([loads(text) for text in texts], (len(texts), len(Loads._fields)))
    row_N, count = balancing.of_counts(loads_ND, Row(*shape).limits, rows, even=EVEN)
    made = [_Row(Row(*shape)) for _ in range(count)]
    for rollout, text, advantage, row in zip(records, texts, advantages_N, row_N, strict=True):
        if row >= 0:
            made[row].add(rollout, text, float(advantage), names.index(rollout.source))
    return stacked([row.arrays() for row in made], [row.shown for row in made]), int((row_N < 0).sum())


class _Row:
    """A row under construction and what reinforcement learning adds to it."""

    def __init__(self, row: Row):
        self.row = row
        length = len(row.text["tokens"])
        self._more = {
            "branches": np.zeros(length, np.int32),
            "advantage": np.zeros(length, np.float32),
            "old_logprob": np.zeros(length, np.float32),
        }
        self.shown: list[Shown] = []

    def add(self, rollout: Rollout, text: Document, advantage: float, source: int) -> None:
        start = self.row.tokens
        self.row.add(text, source)
        whole, said = slice(start, self.row.tokens), slice(start + len(rollout.prompt), self.row.tokens)
        # A branch without a trunk sees itself alone, as the text does; its number tells neighbours apart.
        self._more["branches"][whole] = self.row.documents
        drawn: Any = rollout.drawn  # of an episode this is told
        self._more["advantage"][said] = np.where(drawn, advantage, 0.0)
        self._more["old_logprob"][said] = rollout.logprobs
        self.shown.append(Shown(rollout, slice(start, start), whole))

    def arrays(self) -> Batch:
        return self.row.arrays() | self._more
