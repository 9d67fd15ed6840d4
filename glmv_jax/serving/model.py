"""How the models that are served write their prompts: public checkpoints by their own files, ours by our dialect."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import video
from glmv_jax.data.building import Document
from glmv_jax.data.chat import Writer
from glmv_jax.data.conversation import write_media
from glmv_jax.data.dialect import COMPACT, Dialect, last_of_user
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.processor import Conversation, Processor
from glmv_jax.inference.requests import Prompt
from glmv_jax.inference.sampler import Sampling
from glmv_jax.typing import UserError

# Of the special tokens those that an answer may hold, beside the ones that end it.
ANSWERS = (
    "<|begin_of_box|>", "<|end_of_box|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Public:
    """A public checkpoint, as its small files have it.

    Raises UserError for one without a tokenizer, and as `data.processor.Processor`.
    """

    processor: Processor

    def __post_init__(self) -> None:
        if self.processor.tokenizer is None:
            raise UserError(f"{self.processor.folder} has no tokenizer.json, so it can be asked nothing; copy it there")

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def patcher(self) -> Patcher:
        return self.processor.patcher

    @property
    def stops(self) -> tuple[int, ...]:
        return self.processor.stops

    def sampling(self, tokens: int) -> Sampling:
        """As the checkpoint's authors draw answers: nothing is suppressed."""
        said = self.processor.generation
        settings = {name: said[name] for name in ("temperature", "top_p") if said.get(name) is not None}
        return Sampling(tokens, stop=self.stops, **settings)

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], tools: Sequence[Mapping[str, Any]],
        thinking: bool | None, films: Sequence[bytes] = (),
    ) -> Prompt:  # fmt: skip
        """See `answers.Model`."""
        settings = {} if thinking is None else {"enable_thinking": thinking}
        return Prompt.of_document(self.processor.conversation(Conversation(messages, tools, settings), images, films))

    def of_ids(self, ids: Sequence[int], images: Sequence[Image.Image]) -> Prompt:
        """See `answers.Model`."""
        return _of_ids(ids, images, self.processor.patcher if images else None, self.processor.image)


@dataclasses.dataclass(frozen=True)
class Own:
    """A model that one of our runs trained. thinking: whether its turns are opened for it where nobody says.
    film_frames: of a film that are shown at most; 0 for a model that sees none.   film_patches: of a group of them."""

    tokenizer: Any
    patcher: Patcher
    thinking: bool = False
    dialect: Dialect = COMPACT
    film_frames: int = 0
    film_patches: int = 256

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(sorted(self.tokenizer.stops))

    def sampling(self, tokens: int) -> Sampling:
        """Drawn as it was trained."""
        return Sampling.chat(self.tokenizer, tokens, allow=ANSWERS)

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], tools: Sequence[Mapping[str, Any]],
        thinking: bool | None, films: Sequence[bytes] = (),
    ) -> Prompt:  # fmt: skip
        """See `answers.Model`."""
        dialect, thinking = self.dialect, self.thinking if thinking is None else thinking
        last_user = last_of_user(messages)
        stills, moving = iter(images), iter(films)
        parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
        seen = [[(0.0, self.patcher(next(stills)))] if part["type"] == "image" else self._groups(next(moving))
                for part in parts if part["type"] != "text"]  # fmt: skip
        merged = [[(seconds, self._merged(patched)) for seconds, patched in groups] for groups in seen]
        kinds = (part["type"] for part in parts if part["type"] != "text")
        waiting = iter([groups[0][1] if kind == "image" else groups for kind, groups in zip(kinds, merged)])
        writer, suffix = Writer(self.tokenizer), "" if thinking else dialect.suffix
        pieces = [*dialect.pieces(messages, tools, lambda n: n > last_user, suffix), *dialect.opening(thinking)]
        writer.pieces(pieces, [0.0] * len(messages), lambda: write_media(writer, self.tokenizer, waiting))
        written, pictures = writer.done(), tuple(patched for groups in seen for _, patched in groups)
        return Prompt.of_document(
            Document(written.tokens, np.zeros(len(written.tokens), np.float32), written.image_of_token, pictures,
                     "asked", "asked")
        )  # fmt: skip

    def _groups(self, film: bytes) -> list[tuple[float, tuple[np.ndarray, np.ndarray]]]:
        """(seconds, patches) of the groups of frames that are shown, as in training (`data.local.assembling`)."""
        if not self.film_frames:
            raise UserError("this model was not trained on films; send pictures of their frames")
        patcher = dataclasses.replace(self.patcher, max_patches=self.film_patches)
        sample = functools.partial(video.sampled, most=self.film_frames, group=patcher.frames)
        groups = video.frame_groups(film, sample, patcher.frames)
        return [(seconds, patcher.moving(frames)) for seconds, frames in groups]

    def of_ids(self, ids: Sequence[int], images: Sequence[Image.Image]) -> Prompt:
        """See `answers.Model`."""
        return _of_ids(ids, images, self.patcher if images else None, self.tokenizer.image)

    def _merged(self, patched: tuple[np.ndarray, np.ndarray]) -> int:
        return len(patched[0]) // self.patcher.merge**2


def _of_ids(
    ids: Sequence[int], images: Sequence[Image.Image], patcher: Patcher | None, placeholder: int | None
) -> Prompt:
    """A prompt of ids, its images as they are: whoever wrote the ids has sized them, and they are not sized again.

    patcher: for the sizes of patches, None without images.   placeholder: the id of a visual token, None for a model of
    text alone.
    """
    tokens, patched, merged = np.asarray(ids, np.int32), [], []
    if images and patcher is None:
        raise UserError("this model reads text alone, but images were given; leave them out")
    if patcher is not None:
        patched = [patcher.cut(image) for image in images]
        merged = [len(patches) // patcher.merge**2 for patches, _ in patched]
    shown = np.zeros(len(tokens), bool) if placeholder is None else tokens == placeholder
    if shown.sum() != sum(merged):
        raise UserError(f"the prompt has {shown.sum()} image tokens, but its images are {sum(merged)} visual ones; "
                        "send them at the size that they have in the prompt")  # fmt: skip
    image_of_token = np.full(len(tokens), -1, np.int32)
    image_of_token[shown] = np.repeat(np.arange(len(merged)), merged)
    weight = np.zeros(len(tokens), np.float32)
    return Prompt.of_document(Document(tokens, weight, image_of_token, tuple(patched), "asked", "asked"))
