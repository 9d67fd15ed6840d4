"""Rollouts to packed training rows: the sampled ids as they are, never tokenised again, with the pixels they saw.

Rollouts of one prompt that share a row share the prompt and its image: both are there once, and each answer is a branch
that sees the prompt and itself (`typing.TokenInput.branches`), so prompt and pixels are encoded once for all of them in
training as they were in sampling. The prompt's last token, which predicts the first of every answer, stands at the head
of each branch.

Rows are filled as those of the other stages are, by tokens, patches, learnt tokens and images at once, and even in the
first two (`data.balancing`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmv_jax.data import balancing
from glmv_jax.data.packing import Loads
from glmv_jax.rl.integrity import MERGE, Shown, column
from glmv_jax.rl.rollout import Rollout
from glmv_jax.typing import Batch, UserError

EVEN = 2  # of `Loads`, the first: tokens and patches


class _Row:
    """A row under construction; arrays are those of the vlm batch contract and four more."""

    def __init__(self, tokens: int, patches: int, like: np.ndarray):
        self.arrays: dict[str, np.ndarray] = {
            "tokens": np.zeros(tokens, np.int32),
            "positions": np.zeros((tokens, 3), np.int32),
            "segments": np.zeros(tokens, np.int32),
            "branches": np.zeros(tokens, np.int32),
            "image_row": np.full(tokens, -1, np.int32),
            "loss_weight": np.zeros(tokens, np.float32),
            "source": np.full(tokens, -1, np.int32),
            "advantage": np.zeros(tokens, np.float32),
            "old_logprob": np.zeros(tokens, np.float32),
            "patches": np.zeros((patches, like.shape[-1]), like.dtype),
            "yx": np.zeros((patches, 2), np.int32),
            "frame": np.zeros(patches, np.int32),
        }
        self.shown: list[Shown] = []
        self._tokens = self._patches = self._segments = self._frames = 0

    def add(self, piece: _Piece, prompts: Batch, names: Sequence[str], per: str) -> None:
        """A prompt and answers to it, for which there is room."""
        a, first = self.arrays, piece.records[0]
        source, last = names.index(first.source), len(first.prompt) - 1
        shared = self._add_prompt(first, prompts, source)
        for branch, (record, advantage) in enumerate(zip(piece.records, piece.advantages), start=1):
            n = len(record.answer)
            own, said = slice(self._tokens, self._tokens + 1 + n), slice(self._tokens + 1, self._tokens + 1 + n)
            a["segments"][own], a["branches"][own], a["source"][own] = self._segments, branch, source
            a["tokens"][own] = prompts["tokens"][record.row, last], *record.answer
            a["positions"][self._tokens] = prompts["positions"][record.row, last]
            a["positions"][said] = prompts["next_position"][record.row] + np.arange(n)[:, None]
            a["loss_weight"][said] = record.own * (1.0 if per == "token" else 1.0 / max(1, record.own.sum()))
            a["advantage"][said], a["old_logprob"][said] = advantage, record.logprobs
            self.shown.append(Shown(record, shared, own))
            self._tokens = own.stop

    def _add_prompt(self, record: Rollout, prompts: Batch, source: int) -> slice:
        """What all answers share: the prompt without its last token, and the images. Its place."""
        a, last, count = self.arrays, len(record.prompt) - 1, _patches(record, prompts)
        there, asked = slice(self._patches, self._patches + count), slice(self._tokens, self._tokens + last)
        for name in ("patches", "yx"):
            a[name][there] = prompts[name][record.row, :count]
        frame = prompts["frame"][record.row, :count]
        a["frame"][there] = frame + self._frames
        self._segments += 1
        a["segments"][asked], a["source"][asked] = self._segments, source
        a["tokens"][asked] = prompts["tokens"][record.row, :last]
        a["positions"][asked] = prompts["positions"][record.row, :last]
        rows = prompts["image_row"][record.row, :last]
        a["image_row"][asked] = np.where(rows >= 0, rows + self._patches // MERGE, -1)
        self._frames += int(frame.max(initial=0))
        self._patches, self._tokens = there.stop, asked.stop
        return asked


def _patches(record: Rollout, prompts: Batch) -> int:
    return int((prompts["frame"][record.row] > 0).sum())


class _Piece(NamedTuple):
    """Rollouts of one prompt, all or some of its group, that go into one row; and what they take of it."""

    records: list[Rollout]
    advantages: list[float]
    loads: Loads


def to_batch(
    records: Sequence[Rollout],
    prompts: Batch,
    advantages_N: np.ndarray,
    *,
    rows: Sequence[int],
    tokens: int,
    patches: int,
    names: Sequence[str],
    targets: int | None = None,
    images: int | None = None,
    per: str = "rollout",
) -> tuple[Batch, int]:
    """Packed rows of the vlm batch contract with "branches", "advantage" and "old_logprob" [B, T], for one update, and
    "shown", which `integrity.checked` takes off; and the number of rollouts that found no room in them.

    Args:
      records: rollouts, those of one prompt beside each other (they share it), the most important prompts first: when
        the rows are full, the prompts that still fit nowhere are left out with all their rollouts.
      prompts: the prompt batch they were made from.
      advantages_N: one number a rollout.
      rows: allowed numbers of rows: the smallest that holds everything is used (each is one compilation).
      tokens, patches: of a row; targets, images: answer tokens and images of a row, None for any number.
      names: source names; "source" counts in them.
      per: "token": loss_weight is 1 on the tokens that were drawn, the stop token included; "rollout": 1 / their number
        there. The sum of weight * loss over the sum of weights is then the token mean (DAPO) or the mean over
        rollouts of their token means (GRPO), however the rollouts are packed.
    Raises:
      UserError: a rollout is longer than a row.
    """
    if per not in ("token", "rollout"):
        raise ValueError(f"per={per!r} must be 'token' or 'rollout'")
    if any(record.drawn is not None for record in records):
        raise ValueError("episodes of several turns are packed by rl.episodes.to_rows")
    if len(records) != len(advantages_N):
        raise ValueError(f"{len(records)} rollouts but {len(advantages_N)} advantages")
    limits = Loads.of_row(tokens, patches, targets, images)
    kept = [pair for pair in zip(records, advantages_N) if len(pair[0].answer)]
    groups = [list(pairs) for _, pairs in itertools.groupby(kept, key=lambda pair: pair[0].row)]
    pieces = [piece for group in groups for piece in _pieces(group, prompts, limits)]
    row_N, count = balancing.of_counts(loads_of(pieces), limits, rows, even=EVEN)
    without = {piece.records[0].row for piece, row in zip(pieces, row_N) if row < 0}
    made, left_out = [_Row(tokens, patches, prompts["patches"]) for _ in range(count)], 0
    for piece, row in zip(pieces, row_N):
        if piece.records[0].row in without:  # a group is compared as a whole, so it is learnt as a whole
            left_out += len(piece.records)
        else:
            made[row].add(piece, prompts, names, per)
    return stacked([row.arrays for row in made], [row.shown for row in made]), left_out


def loads_of(pieces: Sequence[_Piece]) -> np.ndarray:
    """[N, 4], also of none."""
    return np.reshape([piece.loads for piece in pieces], (len(pieces), len(Loads._fields)))


def stacked(rows: Sequence[Batch], shown: Sequence[Sequence[Shown]]) -> Batch:
    """The rows of a batch with what they are to show, which `integrity.checked` looks at."""
    return {name: np.stack([arrays[name] for arrays in rows]) for name in rows[0]} | {"shown": column(shown)}


def for_ranks(batch: Batch, ranks: int) -> Batch:
    """The rows in an order in which each of `ranks` equal runs of them has as many tokens and patches as another, as
    devices share them out; unchanged where they do not divide."""
    count = len(batch["tokens"])
    if ranks == 1 or count % ranks:
        return batch
    loads_RD = np.stack([(batch[name] > 0).sum(1) for name in ("segments", "frame")], 1)
    order = np.argsort(balancing.assign(loads_RD, ranks), kind="stable")
    return {name: x[order] for name, x in batch.items()}


def _pieces(group: Sequence[tuple[Rollout, float]], prompts: Batch, limits: Loads) -> list[_Piece]:
    """A prompt's rollouts and their advantages as one piece, or as few as rows of these limits need.

    UserError for a rollout that no row holds.
    """
    first = group[0][0]
    fixed = Loads(len(first.prompt) - 1, _patches(first, prompts), 0, int(prompts["frame"][first.row].max(initial=0)))
    pieces: list[_Piece] = []
    for record, advantage in group:
        n = len(record.answer)
        more = Loads(1 + n, 0, n, 0)
        if not pieces or not _fit(both := _sum(pieces[-1].loads, more), limits):
            both = _sum(fixed, more)
            pieces.append(_Piece([], [], both))
        if not _fit(both, limits):
            raise UserError(
                f"rollout {record.id}: {both.tokens} tokens, {both.patches} patches, {both.targets} answer tokens and "
                f"{both.images} images do not fit a row of {', '.join(f'{limit:g}' for limit in limits)}; enlarge it"
            )
        pieces[-1] = _Piece([*pieces[-1].records, record], [*pieces[-1].advantages, float(advantage)], both)
    return pieces


def _sum(a: Loads, b: Loads) -> Loads:
    return Loads._make(x + y for x, y in zip(a, b))


def _fit(loads: Loads, limits: Loads) -> bool:
    return all(load <= limit for load, limit in zip(loads, limits))
