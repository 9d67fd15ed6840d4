"""What the engine is asked and what it gives back: prompts, requests, completions. Host arrays; nothing is computed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from glmv_jax.data.building import Document
from glmv_jax.data.packing import collate
from glmv_jax.typing import Batch, UserError

MERGE = 4  # patches of a merged visual token


class Picture(NamedTuple):
    """One image, or two frames of a film that share patches.

    patches: [P, C];  yx: [P, 2] int, as in `typing.VisionInput`;  digest: of both, 16 bytes.
    """

    patches: np.ndarray
    yx: np.ndarray
    digest: bytes

    @classmethod
    def of(cls, patches: np.ndarray, yx: np.ndarray) -> Picture:
        patches, yx = np.ascontiguousarray(patches), np.ascontiguousarray(yx, np.int32)
        digest = hashlib.blake2b(f"{patches.dtype} {patches.shape}".encode(), digest_size=16)
        digest.update(patches.data)
        digest.update(yx.data)
        return cls(patches, yx, digest.digest())

    @property
    def merged(self) -> int:
        """How many visual tokens it is."""
        return len(self.patches) // MERGE


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, of its own length.

    tokens: int32 [T];  positions: int32 [T, 3], as `data.packing.rope_positions` counts them;  image_row: int32 [T],
    for an image token its number among the visual tokens of all pictures, one after the other, else -1.
    Raises UserError for a prompt without tokens, for one whose last token is an image's (its answer would have nothing
    to follow), and for pictures and image tokens that differ in number.
    """

    tokens: np.ndarray
    positions: np.ndarray
    image_row: np.ndarray
    pictures: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise UserError("the prompt has no tokens; give at least one")
        if self.image_row[-1] >= 0:
            raise UserError("the prompt ends inside an image; let text follow it")
        shown, merged = int((self.image_row >= 0).sum()), sum(picture.merged for picture in self.pictures)
        if shown != merged or self.image_row.max() >= merged:
            raise UserError(f"the prompt has {shown} image tokens but its pictures are {merged} visual tokens; "
                            "build it with `Prompt.of_document`")  # fmt: skip

    @functools.cached_property
    def contents(self) -> np.ndarray:
        """int64 [T]: what stands at each place, equal where the model would read the same: a token's id, and below 0 a
        hash of the picture and the place in it."""
        found, hashes = self.tokens.astype(np.int64), []
        for picture in self.pictures:
            base, step = np.frombuffer(picture.digest, np.uint64)
            places = np.arange(picture.merged, dtype=np.uint64)
            hashes.append((base + places * (step | np.uint64(1))) | np.uint64(1 << 63))
        if hashes:
            at = np.flatnonzero(self.image_row >= 0)
            found[at] = np.concatenate(hashes).view(np.int64)[self.image_row[at]]
        return found

    @classmethod
    def of_ids(cls, ids: Sequence[int] | np.ndarray) -> Prompt:
        """Text alone."""
        tokens = np.asarray(ids, np.int32)
        positions = np.repeat(np.arange(len(tokens), dtype=np.int32)[:, None], 3, axis=1)
        return cls(tokens, positions, np.full(len(tokens), -1, np.int32))

    @classmethod
    def of_document(cls, document: Document) -> Prompt:
        """As `DocumentBuilder.prompt` and the public processors build it."""
        channels = document.images[0][0].shape[1] if document.images else 0
        row = collate([document], len(document.tokens), document.patches, channels, [document.source])
        pictures = tuple(Picture.of(*image) for image in document.images)
        return cls(row["tokens"][0], row["positions"][0], row["image_row"][0], pictures)

    @classmethod
    def of_row(cls, batch: Batch, row: int) -> Prompt:
        """Row `row` of a batch of prompts (`data.packing.collate`), such as reinforcement learning reads."""
        frame = batch["frame"][row]
        pictures = tuple(
            Picture.of(batch["patches"][row][frame == n], batch["yx"][row][frame == n])
            for n in range(1, int(frame.max(initial=0)) + 1)
        )
        tokens, positions, image_row = (np.asarray(batch[name][row][: batch["length"][row]], np.int32)
                                        for name in ("tokens", "positions", "image_row"))  # fmt: skip
        return cls(tokens, positions, image_row, pictures)


Reason: TypeAlias = Literal["stop", "length", "aborted"]


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """An answer, whole or begun.

    tokens: int32 [n], the stop token included.   logprobs: float32 [n], as `sampler.Generated.logprobs` defines them.
    versions: int32 [n], of the parameters that drew each token; -1 for one that nobody drew (`forced`).
    reason: "stop", "length" (max_new_tokens cut it off), or "aborted".
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    reason: Reason

    @classmethod
    def forced(cls, ids: Sequence[int] | np.ndarray, after: Completion | None = None) -> Completion:
        """The beginning of an answer that the model did not choose, behind one that it did: for `Request.begun`."""
        tokens = np.asarray(ids, np.int32)
        own = cls(tokens, np.zeros(len(tokens), np.float32), np.full(len(tokens), -1, np.int32), "aborted")
        if after is None:
            return own
        tokens, logprobs, versions = (
            np.concatenate([getattr(after, name), getattr(own, name)]) for name in ("tokens", "logprobs", "versions")
        )
        return cls(tokens, logprobs, versions, "aborted")


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One answer to one prompt. What is None is as the engine's `Sampling` says.

    seed, draw: the answer is row `draw` of what `sampler.Sampler` draws with jax.random.key(seed): token t depends on
        seed, draw, t and what is before it, and on nothing else.
    max_new_tokens: length of the answer, `begun` included.
    likely: whether the likeliest tokens are told, as many as `Settings.likely` says, to who is told of the tokens.
    begun: an answer that was aborted, to go on from; the completion begins with it.
    """

    prompt: Prompt
    seed: int = 0
    draw: int = 0
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    begun: Completion | None = None
    likely: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64 or not 0 <= self.draw < 1 << 31:
            raise UserError(f"seed={self.seed}, draw={self.draw}: a seed is 0 to 2**64 - 1, a draw 0 to 2**31 - 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} asks for no answer; use at least 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} is out of range; use 0 for the likeliest answer, 1 for a "
                            "sample")  # fmt: skip
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is out of range; use 1 to keep all tokens, less to keep the likeliest")


class Likely(NamedTuple):
    """The K likeliest tokens at each of n places, the likeliest first: ids int32 [n, K] and log-probabilities float32
    [n, K], as `sampler.Generated.logprobs` defines them, suppressed tokens too."""

    tokens: np.ndarray
    logprobs: np.ndarray


class Busy(UserError):
    """The engine's queue is full: come back later, or lengthen it (`Settings.queue`)."""


def group(prompt: Prompt, size: int, seed: int, **settings: Any) -> list[Request]:
    """`size` answers to one prompt, which read it once between them."""
    return [Request(prompt, seed, draw, **settings) for draw in range(size)]
