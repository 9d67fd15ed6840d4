"""Samples to documents: the tokens, loss weights and patches of one training text, before packing.

Two forms. `chat` (SFT, RL, evaluation) is the dialect of `chat.py`: loss on the answer and its stop token. `pretrain`
is plain text, `[gMASK]<sop>{images}{prompt}\\n{answer}<|endoftext|>` with loss on the answer and the end; a caption or
a plain text has no prompt, so all of its text is learnt. In both, further questions about the same images follow.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from glmv_jax.data import chat
from glmv_jax.data.chat import Rendered
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.records import Sample
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError

# The exponent of a document's number of learnt tokens that its loss is divided by.
POWERS = {"token": 0.0, "sqrt": 0.5, "document": 1.0}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with its images.

    tokens int32 [T], loss_weight float32 [T], image_of_token int32 [T] (number of the image of an `<|image|>` token,
    else -1), images: (patches uint8 [P, C], yx int32 [P, 2]) each; source and id as in the sample.
    trimmed: "" for a whole text; what was done to one that was longer than a row, said by the first of its parts.
    """

    tokens: np.ndarray
    loss_weight: np.ndarray
    image_of_token: np.ndarray
    images: tuple[tuple[np.ndarray, np.ndarray], ...]
    source: str
    id: str
    trimmed: str = ""

    @property
    def patches(self) -> int:
        """Patches of all images together."""
        return sum(len(patches) for patches, _ in self.images)

    @property
    def targets(self) -> int:
        """Tokens that are learnt."""
        return int((self.loss_weight > 0).sum())


@dataclasses.dataclass(frozen=True)
class DocumentBuilder:
    """Sample -> Document. `max_tokens` and `max_patches` are those of a row: what is longer raises UserError.

    max_targets: how many tokens of a row may be learnt, None for all.   max_images: of a row, None for any number.
    per: what weighs the same in the loss: "token" (long answers count most), "document" (its tokens share a weight of
        one), or "sqrt" between them, one over the root of the learnt tokens (InternVL3, arXiv 2504.10479, "square
        averaging").
    prompt_weight: loss weight of prompt tokens in the pretrain form (questions come from templates, so little is
    learnt from them and much of the gradient would be theirs).
    thinking: whether the answer to a `prompt` is to begin with thinking.
    """

    tokenizer: Tokenizer
    patcher: Patcher
    max_tokens: int
    max_patches: int
    prompt_weight: float = 0.0
    max_targets: int | None = None
    per: str = "token"
    max_images: int | None = None
    thinking: bool = False

    def __post_init__(self) -> None:
        if self.per not in POWERS:
            raise UserError(f"data.per={self.per!r} is not known; use one of {', '.join(POWERS)}")

    def chat(self, sample: Sample) -> Document:
        """Questions and answers as a conversation, loss on the answers."""
        said = lambda answer: chat.boxed(answer) if sample.boxed else answer  # noqa: E731
        turns = [{"role": "assistant", "content": said(sample.answer)}]
        for question, answer in sample.more:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said(answer)}]
        return self._conversation(sample, turns)

    def prompt(self, sample: Sample) -> Document:
        """The question alone, ending in the generation prompt."""
        return self._conversation(sample, [])

    def pretrain(self, sample: Sample) -> Document:
        """Images, then prompt and answer as plain text."""
        images = self._images(sample)
        writer = chat.Writer(self.tokenizer)
        writer.special("[gMASK]", "<sop>")
        merged = iter(self._merged(images))
        for part in sample.parts()[:-1]:
            if part["type"] == "image":
                writer.image(next(merged))
            else:
                writer.ids(self.tokenizer.encode(part["text"]), self.prompt_weight)
        if sample.prompt:
            writer.ids(self.tokenizer.encode(sample.prompt + "\n"), self.prompt_weight)
        writer.ids(self.tokenizer.encode(sample.answer), 1.0)
        for question, answer in sample.more:
            writer.ids(self.tokenizer.encode("\n"), 1.0)
            writer.ids(self.tokenizer.encode(question + "\n"), self.prompt_weight)
            writer.ids(self.tokenizer.encode(answer), 1.0)
        writer.special("<|endoftext|>", weight=1.0)
        return self._checked(writer.done(), images, sample)

    def _conversation(self, sample: Sample, turns: list[dict]) -> Document:
        images = self._images(sample)
        messages = [{"role": "user", "content": sample.parts()}, *turns]
        merged, asks = self._merged(images), not turns
        rendered = chat.render(messages, self.tokenizer, merged, generation_prompt=asks, thinking=self.thinking)
        return self._checked(rendered, images, sample)

    def _images(self, sample: Sample) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """The images as patches: those of a film, or several others, that are too many for a row share its budget."""
        block, patcher = self.patcher.merge**2, self.patcher
        share = self.max_patches // max(1, len(sample.images)) // block * block
        if block <= share < patcher.max_patches:
            patcher = dataclasses.replace(patcher, max_patches=share)
        return tuple(patcher(image) for image in sample.images)

    def _merged(self, images: tuple[tuple[np.ndarray, np.ndarray], ...]) -> list[int]:
        return [len(patches) // self.patcher.merge**2 for patches, _ in images]

    def _checked(self, rendered: Rendered, images: tuple, sample: Sample) -> Document:
        document = self.finished(rendered, images, sample.id, sample.source)
        if reason := self.too_long(document):
            raise UserError(reason)
        return document

    def finished(self, rendered: Rendered, images: tuple, id_: str, source: str = "") -> Document:
        """A rendered text and its images as a document, its loss weights as `per` says, of whatever length."""
        learnt = max(1, int((rendered.loss_weight > 0).sum()))
        loss_weight = rendered.loss_weight * np.float32(learnt ** -POWERS[self.per])
        return Document(rendered.tokens, loss_weight, rendered.image_of_token, images, source, id_)

    def too_long(self, document: Document) -> str:
        """Why a document does not fit a row, "" for one that does."""
        if len(document.tokens) > self.max_tokens:
            return f"{len(document.tokens)} tokens do not fit a row of {self.max_tokens}; lengthen the row"
        if document.patches > self.max_patches:
            return f"{document.patches} patches do not fit a row of {self.max_patches}; raise the budget"
        if self.max_targets is not None and document.targets > self.max_targets:
            return f"{document.targets} learnt tokens do not fit a row of {self.max_targets}; raise it"
        if self.max_images is not None and len(document.images) > self.max_images:
            return f"{len(document.images)} images do not fit a row of {self.max_images}; raise it"
        return ""
