"""Rollouts to packed training rows: the sampled ids as they are, never tokenised again, with the pixels they saw.

Rollouts of one prompt that share a row share the prompt and its image: both are there once, and each answer is a branch
that sees the prompt and itself (`typing.TokenInput.branches`), so prompt and pixels are encoded once for all of them in
training as they were in sampling. The prompt's last token, which predicts the first of every answer, stands at the head
of each branch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from glmv_jax.rl.rollout import Rollout, image_hash
from glmv_jax.typing import Batch, UserError

MERGE = 4  # patches of a merged visual token


class _Row:
    """A row under construction; arrays are those of the vlm batch contract and four more."""

    def __init__(self, tokens: int, patches: int, like: np.ndarray, targets: int):
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
        self.tokens = self.patches = self.segments = self.frames = self.targets = 0
        self.limit = targets
        self.prompts: dict[int, list[int]] = {}  # prompt row -> its segment and how many branches it has

    def fits(self, records: Sequence[Rollout], prompts: Batch) -> bool:
        """Whether all of them, rollouts of one prompt, have room."""
        first, answers = records[0], sum(len(record.answer) for record in records)
        new = first.row not in self.prompts
        return (
            self.tokens + new * (len(first.prompt) - 1) + len(records) + answers <= len(self.arrays["tokens"])
            and self.patches + new * _patches(first, prompts) <= len(self.arrays["frame"])
            and self.targets + answers <= self.limit
        )

    def add(self, record: Rollout, prompts: Batch, advantage: float, weight: float, source: int) -> None:
        a, last, n = self.arrays, len(record.prompt) - 1, len(record.answer)
        if record.row not in self.prompts:
            self._add_prompt(record, prompts, source)
        self.prompts[record.row][1] += 1
        segment, branch = self.prompts[record.row]
        whole, said = slice(self.tokens, self.tokens + 1 + n), slice(self.tokens + 1, self.tokens + 1 + n)
        a["segments"][whole], a["branches"][whole], a["source"][whole] = segment, branch, source
        a["tokens"][whole] = record.prompt[last], *record.answer
        a["positions"][self.tokens] = prompts["positions"][record.row, last]
        a["positions"][said] = prompts["next_position"][record.row] + np.arange(n)[:, None]
        a["loss_weight"][said], a["advantage"][said], a["old_logprob"][said] = weight, advantage, record.logprobs
        self.tokens, self.targets = whole.stop, self.targets + n

    def _add_prompt(self, record: Rollout, prompts: Batch, source: int) -> None:
        """The trunk: the prompt without its last token, and the image."""
        a, last, count = self.arrays, len(record.prompt) - 1, _patches(record, prompts)
        there, asked = slice(self.patches, self.patches + count), slice(self.tokens, self.tokens + last)
        for name in ("patches", "yx"):
            a[name][there] = prompts[name][record.row, :count]
        frame = prompts["frame"][record.row, :count]
        a["frame"][there] = frame + self.frames
        self.segments += 1
        a["segments"][asked], a["source"][asked] = self.segments, source
        a["tokens"][asked] = record.prompt[:last]
        a["positions"][asked] = prompts["positions"][record.row, :last]
        rows = prompts["image_row"][record.row, :last]
        a["image_row"][asked] = np.where(rows >= 0, rows + self.patches // MERGE, -1)
        _check_pixels(a, asked, record)
        self.frames += int(frame.max(initial=0))
        self.prompts[record.row] = [self.segments, 0]
        self.patches, self.tokens = there.stop, asked.stop


def _patches(record: Rollout, prompts: Batch) -> int:
    return int((prompts["frame"][record.row] > 0).sum())


def _check_pixels(arrays: dict[str, np.ndarray], asked: slice, record: Rollout) -> None:
    """ValueError unless the prompt at `asked` shows, in order, the very pixels the answer was sampled from.

    Training on an answer with another image, or none, runs without a sign of trouble: it must not start.
    """
    merged = arrays["image_row"][asked]
    rows = (merged[merged >= 0][:, None] * MERGE + np.arange(MERGE)).reshape(-1)
    seen = image_hash(arrays["patches"][rows], arrays["yx"][rows])
    if seen != record.image_hash:
        raise ValueError(
            f"rollout {record.id}: the training row shows image {seen or 'none'} but the answer was sampled from image "
            f"{record.image_hash or 'none'}; pass the prompt batch that the rollouts were made from"
        )


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
    per: str = "rollout",
) -> tuple[Batch, int]:
    """Packed rows of the vlm batch contract with "branches", "advantage" and "old_logprob" [B, T], for one update; and
    the number of rollouts that found no room in them.

    Args:
      records: rollouts, those of one prompt beside each other (they share it), the most important prompts first: when
        the rows are full, the prompts that still fit nowhere are left out with all their rollouts.
      prompts: the prompt batch they were made from.
      advantages_N: one number a rollout.
      rows: allowed numbers of rows, rising: the smallest that holds everything is used (each is one compilation).
      tokens, patches: of a row; targets: answer tokens of a row, None for any number.
      names: source names; "source" counts in them.
      per: "token": loss_weight is 1 on answer tokens, the stop token included; "rollout": 1 / the answer's length
        there. The sum of weight * loss over the sum of weights is then the token mean (DAPO) or the mean over
        rollouts of their token means (GRPO), however the rollouts are packed.
    Raises:
      UserError: a rollout is longer than a row.
      ValueError: the prompt or its pixels are not those the answer was sampled from.
    """
    if per not in ("token", "rollout"):
        raise ValueError(f"per={per!r} must be 'token' or 'rollout'")
    if any(record.drawn is not None for record in records):
        raise ValueError("episodes of several turns are packed by rl.episodes.to_rows")
    if len(records) != len(advantages_N):
        raise ValueError(f"{len(records)} rollouts but {len(advantages_N)} advantages")
    new_row = functools.partial(_Row, tokens, patches, prompts["patches"], tokens if targets is None else targets)
    packed: list[_Row] = []
    left_out = 0
    kept = [pair for pair in zip(records, advantages_N) if len(pair[0].answer)]
    for _, pairs in itertools.groupby(kept, key=lambda pair: pair[0].row):
        group = list(pairs)
        # The first row that holds the whole group, or rows of its own.
        row = next((row for row in packed if row.fits([record for record, _ in group], prompts)), None)
        full = row is None and len(packed) == max(rows)
        fresh = [] if full else _place(group, row, new_row, prompts, names, per)
        if full or len(packed) + len(fresh) > max(rows):
            left_out += len(group)
        else:
            packed += fresh
    count = min(n for n in rows if n >= len(packed))
    packed += [new_row() for _ in range(count - len(packed))]
    return {name: np.stack([row.arrays[name] for row in packed]) for name in packed[0].arrays}, left_out


def _place(
    group: Sequence[tuple[Rollout, float]],
    row: _Row | None,
    new_row: Callable[[], _Row],
    prompts: Batch,
    names: Sequence[str],
    per: str,
) -> list[_Row]:
    """Adds a prompt's rollouts and their advantages to `row` and, once that is full or None, to new rows: these."""
    fresh = []
    for record, advantage in group:
        if not np.array_equal(record.prompt, prompts["tokens"][record.row, : len(record.prompt)]):
            raise ValueError(f"rollout {record.id}: row {record.row} of the prompt batch holds another prompt")
        if row is None or not row.fits([record], prompts):
            row = new_row()
            fresh.append(row)
            if not row.fits([record], prompts):
                raise UserError(
                    f"rollout {record.id}: {len(record.prompt) + len(record.answer)} tokens and "
                    f"{_patches(record, prompts)} patches do not fit a row of {len(row.arrays['tokens'])} and "
                    f"{len(row.arrays['frame'])} with {row.limit} answer tokens; enlarge the row"
                )
        weight = 1.0 if per == "token" else 1.0 / len(record.answer)
        row.add(record, prompts, float(advantage), weight, names.index(record.source))
    return fresh
