"""What a packed batch really holds, read back from its arrays: the text of its tokens, the pictures of its patches.

Nothing is taken from the records that the batch was made of, so what is shown is what the model is given.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from glmv_jax.data import coordinates, naflex
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import CLIP_MEAN, CLIP_STD, UserError

_LISTS = re.compile(r"\[\s*\[[\d.,\s\[\]]*\]\s*\]")


@dataclasses.dataclass(frozen=True)
class Run:
    """Tokens in a row that have the same loss weight, as text; or those of a picture.

    picture: its number in the document, -1 for text. weight: that of the first token, and of the others but where a
    character is cut by the change of a weight.
    """

    text: str
    weight: float
    tokens: int
    picture: int = -1


@dataclasses.dataclass(frozen=True)
class Picture:
    """What the tower is given for an image: uint8 [H, W, 3], one for each frame that its patches hold. tokens: that it
    takes, or what else is counted (`unit`). boxes, points: in 0..999, of the lists that the text after it speaks of."""

    frames: tuple[np.ndarray, ...]
    tokens: int
    boxes: tuple[coordinates.Box, ...] = ()
    points: tuple[coordinates.Point, ...] = ()
    unit: str = "tokens"


@dataclasses.dataclass(frozen=True)
class Shown:
    """One document of a row. learnt: tokens with a loss weight."""

    row: int
    segment: int
    source: str
    runs: tuple[Run, ...]
    pictures: tuple[Picture, ...]
    tokens: int
    learnt: int


def read(batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, names: Sequence[str], patch: int) -> list[Shown]:
    """The documents of a vlm batch, in order. names: of the sources. patch: side of a patch in pixels.

    UserError: a batch of another kind.
    """
    if missing := {"tokens", "segments", "image_row", "loss_weight", "patches"} - set(batch):
        raise UserError(f"a batch without {min(missing)} is none of stages 3 to 5; give one of their experiments")
    if "sent" in batch:
        raise UserError("images are not shown out of the encoder's own rows; look at it with data.dispatch.rows=0")
    found = []
    for b in range(len(batch["tokens"])):
        segments = np.asarray(batch["segments"][b])
        for segment in range(1, int(segments.max(initial=0)) + 1):
            found.append(_document(batch, b, segment, np.flatnonzero(segments == segment), tokenizer, names, patch))
    return found


def budgets(batch: Mapping[str, np.ndarray]) -> list[dict[str, tuple[int, int]]]:
    """Of each row what is used and what there is: tokens, patches."""
    used = {"tokens": np.asarray(batch["segments"]) > 0, "patches": np.asarray(batch["frame"]) > 0}
    return [{name: (int(row.sum()), len(row)) for name, row in zip(used, rows)} for rows in zip(*used.values())]


def _document(
    batch: Mapping[str, np.ndarray], b: int, segment: int, at: np.ndarray, tokenizer: Tokenizer, names: Sequence[str],
    patch: int,
) -> Shown:  # fmt: skip
    tokens, weights, rows = (np.asarray(batch[name][b])[at] for name in ("tokens", "loss_weight", "image_row"))
    frame = np.asarray(batch["frame"][b])
    merge = 4  # patches of a visual token
    frames = np.where(rows >= 0, frame[np.maximum(rows, 0) * merge], 0)
    runs: list[Run] = []
    pictures: list[Picture] = []
    for number, group in itertools.groupby(range(len(at)), key=lambda n: int(frames[n])):
        here = list(group)
        if number:
            where = np.flatnonzero(frame == number)
            seen = pixels(np.asarray(batch["patches"][b])[where], np.asarray(batch["yx"][b])[where], patch)
            runs.append(Run("", 0.0, len(here), len(pictures)))
            pictures.append(Picture(seen, len(here)))
        else:
            runs += _text_runs(tokens[here], weights[here], tokenizer)
    source = int(batch["source"][b][at[0]])
    return Shown(b, segment, names[source] if 0 <= source < len(names) else "", tuple(runs),
                 tuple(_marked(runs, pictures)), len(at), int((weights > 0).sum()))


def _text_runs(tokens: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer) -> Iterator[Run]:
    """The text of tokens, cut where the weight changes; all runs together are what the tokens decode to."""
    whole = tokenizer.decode(tokens, keep_special=True)
    cuts = [(0, 0)]
    for n in (np.flatnonzero(np.diff(weights)) + 1).tolist():
        before = tokenizer.decode(tokens[:n], keep_special=True)
        if whole.startswith(before):  # not within a character of several tokens
            cuts.append((n, len(before)))
    for (start, first), (stop, last) in itertools.pairwise([*cuts, (len(tokens), len(whole))]):
        yield Run(whole[first:last], float(weights[start]), stop - start)


def pixels(patches_PC: np.ndarray, yx_P2: np.ndarray, patch: int) -> tuple[np.ndarray, ...]:
    """The frames that the patches of an image hold: as they are (uint8), or of normalised ones (float) to the nearest
    level."""
    if patches_PC.dtype != np.uint8:
        shown = patches_PC.reshape(len(patches_PC), 3, -1).astype(np.float64)
        shown = shown * np.array(CLIP_STD)[:, None] + np.array(CLIP_MEAN)[:, None]
        patches_PC = np.clip(np.rint(shown * 255), 0, 255).astype(np.uint8).reshape(len(patches_PC), -1)
    return tuple(naflex.unpatchify(frame, yx_P2, patch) for frame in naflex.apart(patches_PC, patch))


def _marked(runs: Sequence[Run], pictures: Sequence[Picture]) -> Iterator[Picture]:
    """The pictures with the boxes and points of the lists ("[[1,2,3,4]]") in the text up to the next picture."""
    texts = [""] * len(pictures)
    current = -1
    for run in runs:
        current = run.picture if run.picture >= 0 else current
        if current >= 0:
            texts[current] += run.text
    for picture, text in zip(pictures, texts):
        lists = _LISTS.findall(text)
        boxes = tuple(box for each in lists for box in coordinates.parse_boxes(each) if each.count(",") >= 3)
        points = tuple(point for each in lists for point in coordinates.parse_points(each))
        yield dataclasses.replace(picture, boxes=boxes, points=() if boxes else points)
