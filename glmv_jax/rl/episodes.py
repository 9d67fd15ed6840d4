"""Episodes of several turns as records and as packed training rows.

A record is a `rollout.Rollout` whose answer is all that follows the first observation: what the model drew and what the
environment said in between, pictures included. In a row it is one text with all of its images, learnt where it was
drawn; a group's common beginning is there once for each, which `batch.to_batch` spares answers of one turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glmv_jax.data.building import Document
from glmv_jax.data.packing import Row
from glmv_jax.rl.batch import MERGE
from glmv_jax.rl.play import Episode
from glmv_jax.rl.rewards.grade import MIN_REWARD, Grade
from glmv_jax.rl.rollout import Rollout, image_hash
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
    per: str = "rollout",
) -> tuple[Batch, int]:
    """Packed rows as `batch.to_batch` makes them, each record one text; and how many records found no room.

    Args: see `batch.to_batch`; channels: of a patch vector; image: the id of `<|image|>`.
    Raises:
      UserError: a record is longer than a row.
      ValueError: a row would not show a record's images, pixel for pixel and in order.
    """
    packed: list[_Row] = []
    left_out = 0
    for rollout, advantage in zip(records, advantages_N, strict=True):
        text = document(rollout, image, per)
        row = next((row for row in packed if row.row.fits(text)), None)
        if row is None and len(packed) == max(rows):
            left_out += 1
            continue
        if row is None:
            packed.append(row := _Row(Row(tokens, patches, channels, targets)))
            if not row.row.fits(text):
                raise UserError(f"rollout {rollout.id}: {len(text.tokens)} tokens, {text.patches} patches and "
                                f"{text.targets} drawn ones do not fit a row; enlarge it")  # fmt: skip
        row.add(rollout, text, float(advantage), names.index(rollout.source))
    count = min(n for n in rows if n >= len(packed))
    packed += [_Row(Row(tokens, patches, channels, targets)) for _ in range(count - len(packed))]
    made = [row.arrays() for row in packed]
    return {name: np.stack([arrays[name] for arrays in made]) for name in made[0]}, left_out


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
        self._placed: list[tuple[Rollout, slice]] = []

    def add(self, rollout: Rollout, text: Document, advantage: float, source: int) -> None:
        start = self.row.tokens
        self.row.add(text, source)
        whole, said = slice(start, self.row.tokens), slice(start + len(rollout.prompt), self.row.tokens)
        # A branch without a trunk sees itself alone, as the text does; its number tells neighbours apart.
        self._more["branches"][whole] = self.row.documents
        self._more["advantage"][said] = np.where(rollout.drawn, advantage, 0.0)
        self._more["old_logprob"][said] = rollout.logprobs
        self._placed.append((rollout, whole))

    def arrays(self) -> Batch:
        arrays = self.row.arrays() | self._more
        for rollout, whole in self._placed:
            _check_pixels(arrays, rollout, whole)
        return arrays


def _check_pixels(arrays: Batch, rollout: Rollout, whole: slice) -> None:
    """ValueError unless the row shows, image for image, what the model saw when it drew."""
    shown = arrays["image_row"][whole]
    merged = shown[shown >= 0]
    patches = (merged[:, None] * MERGE + np.arange(MERGE)).reshape(-1)
    frames = arrays["frame"][patches]
    cuts = np.flatnonzero(np.diff(frames)) + 1
    hashes = [image_hash(arrays["patches"][at], arrays["yx"][at]) for at in np.split(patches, cuts) if len(at)]
    if ",".join(hashes) != rollout.image_hash:
        raise ValueError(
            f"rollout {rollout.id}: the training row shows image {','.join(hashes) or 'none'} but the answer was drawn "
            f"from image {rollout.image_hash or 'none'}; keep a record's images with it"
        )
