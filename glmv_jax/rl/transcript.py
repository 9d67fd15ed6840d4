"""A conversation as the ids that an engine saw and drew, in order, never tokenised again; and the pixels they saw.

What an environment says is written as `data.dialect` writes it, what the model draws is taken as it is. The token at
which the model stopped is the one that opens the next turn, where it chose the right one; any other that it drew stays,
and the right one is written behind it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.data.building import Document
from glmv_jax.data.chat import Writer
from glmv_jax.data.dialect import COMPACT, Dialect, Piece
from glmv_jax.data.hashes import image_hash
from glmv_jax.data.naflex import Patcher
from glmv_jax.rl.gym import Action, Observation
from glmv_jax.rl.integrity import check_sealed
from glmv_jax.rl.turns import parse, spoken

HEAD = ("[gMASK]", "<sop>")  # what a conversation begins with
_COLUMNS = ("tokens", "logprobs", "versions", "image_of_token")


@dataclasses.dataclass(frozen=True)
class Form:
    """How conversations become tokens and patches. thinking: whether turns are opened for thinking."""

    tokenizer: Any
    patcher: Patcher
    thinking: bool = False
    dialect: Dialect = COMPACT

    def spoken(self, action: Action) -> list[int]:
        """See `turns.spoken`."""
        return spoken(action, self.tokenizer, self.thinking, self.dialect)

    def parse(self, ids: np.ndarray, tools: Sequence[Mapping[str, Any]] = ()) -> Action:
        """See `turns.parse`."""
        return parse(ids, self.tokenizer, tools, self.thinking)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a model drew: ids int32 [T], the stop token last unless it was cut; logprobs float32 [T], of each under the
    policy that drew it; versions int32 [T], of the weights it was drawn with, -1 for a token that an engine put in, as
    where it has the model answer: that one was not drawn."""

    ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray

    @classmethod
    def of(cls, ids: Any, logprobs: Any = 0.0, versions: Any = 0) -> Turn:
        """From anything that numpy makes arrays of; one number stands for all."""
        ids = np.asarray(ids, np.int32)
        full = lambda x, kind: np.broadcast_to(np.asarray(x, kind), ids.shape)  # noqa: E731
        return cls(ids, full(logprobs, np.float32), full(versions, np.int32))

    def cut(self, room: int) -> Turn:
        """At most the first `room` tokens."""
        return Turn(self.ids[:room], self.logprobs[:room], self.versions[:room])


class Transcript:
    """A conversation under way.

    tokens int32 [T]; versions int32 [T], of the weights that drew each, -1 where none did; logprobs float32 [T], 0
    there; image_of_token int32 [T], the image of an `<|image|>` that was written for it, else -1: one that the model
    drew shows nothing.
    images: (patches uint8 [P, C], yx int32 [P, 2]) each; hashes: of each, taken when it was shown.
    turns: of the model, so far.
    """

    def __init__(self, form: Form):
        self.form = form
        self.tokens = np.zeros(0, np.int32)
        self.logprobs = np.zeros(0, np.float32)
        self.versions = np.zeros(0, np.int32)
        self.image_of_token = np.zeros(0, np.int32)
        self.images: list[tuple[np.ndarray, np.ndarray]] = []
        self.hashes: list[str] = []
        self.turns = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def drawn(self) -> np.ndarray:
        """bool [T], what the model drew."""
        return self.versions >= 0

    @property
    def patches(self) -> int:
        """Of all images together."""
        return sum(len(patches) for patches, _ in self.images)

    def observe(self, observation: Observation) -> None:
        """Writes what an environment says and opens the model's turn.

        Raises ValueError when pictures and image parts differ in number, or pictures are not those that were made
        (`integrity.check_sealed`); UserError for a role or a part that there is
        not, and for a picture that cannot be made to patches.
        """
        check_sealed(observation)
        form, dialect = self.form, self.form.dialect
        images = [form.patcher(image) for image in observation.images]
        waiting = iter(images)
        writer = Writer(form.tokenizer)

        def show() -> None:
            image = next(waiting, None)
            if image is None:
                raise ValueError(f"the observation has more image parts than its {len(images)} pictures")
            writer.image(len(image[0]) // form.patcher.merge**2)

        suffix = "" if form.thinking else dialect.suffix
        pieces = dialect.pieces(observation.messages, observation.tools, lambda n: False, suffix)
        writer.pieces(self._going_on(pieces), [0.0] * len(observation.messages), show)
        if next(waiting, None) is not None:
            raise ValueError(f"the observation brings {len(images)} pictures but has {writer.images} image parts")
        writer.pieces(dialect.opening(form.thinking), (), show)
        written = writer.done()
        of = np.where(written.image_of_token < 0, -1, written.image_of_token + len(self.images))
        self._append(tokens=written.tokens, logprobs=0.0, versions=-1, image_of_token=of)
        self.images += images
        self.hashes += [image_hash(*image) for image in images]

    def draw(self, turn: Turn) -> None:
        """Takes what the model drew, and what was put in between."""
        logprobs = np.where(turn.versions >= 0, turn.logprobs, 0.0)
        self._append(tokens=turn.ids, logprobs=logprobs, versions=turn.versions, image_of_token=-1)
        self.turns += 1

    def ended(self) -> Transcript:
        """The conversation up to the last token that was drawn: what nobody answered is not part of a record."""
        last = int(np.flatnonzero(self.drawn).max(initial=-1))
        other = copy.copy(self)
        for name in _COLUMNS:
            setattr(other, name, getattr(self, name)[: last + 1])
        shown = int(other.image_of_token.max(initial=-1)) + 1
        other.images, other.hashes = self.images[:shown], self.hashes[:shown]
        return other

    def document(self, source: str = "", id_: str = "") -> Document:
        """As one text in which what was drawn is learnt."""
        weight = self.drawn.astype(np.float32)
        return Document(self.tokens, weight, self.image_of_token, tuple(self.images), source, id_)

    def _going_on(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Behind what is there: without a head, nor a first token that the model drew as it stopped."""
        if not len(self):
            return pieces
        pieces = itertools.islice(pieces, len(HEAD), None)
        first = next(pieces, None)
        if first is None:  # the environment had nothing to say
            return pieces
        stopped = self.drawn[-1] and self.form.tokenizer.special[first.text] == self.tokens[-1]
        return pieces if stopped else itertools.chain([first], pieces)

    def _append(self, **columns: Any) -> None:
        length = len(columns["tokens"])
        for name in _COLUMNS:
            before = getattr(self, name)
            more = np.broadcast_to(np.asarray(columns[name], before.dtype), length)
            setattr(self, name, np.concatenate([before, more]))
