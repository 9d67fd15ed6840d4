"""OpenAI-style messages to tokens, in the GLM-4.7/5 dialect (`dialect.COMPACT`) with thinking off.

    [gMASK]<sop><|system|>{text}<|user|><|begin_of_image|><|image|>*M<|end_of_image|>{text}<|assistant|></think>{text}
    <|user|>...<|assistant|></think>{text}<|endoftext|>

A turn ends where the next begins: the model learns to stop with `<|user|>` between turns and with `<|endoftext|>` at
the end. Only assistant text and the token that ends it carry loss. Assistant text is trusted: box tokens in it count;
everything else a message spells stays plain text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from glmv_jax.data.dialect import COMPACT, Piece
from glmv_jax.data.tokenizer import BOX, Tokenizer
from glmv_jax.typing import UserError

ROLES = ("system", "user", "assistant")
_BOX = re.compile(re.escape(BOX[0]) + r"(.*?)(?:" + re.escape(BOX[1]) + r"|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Tokens of a text with images.

    tokens: int32 [T].   loss_weight: float32 [T], of predicting the token AT that position.
    image_of_token: int32 [T], for an `<|image|>` token the number of its image, else -1.
    """

    tokens: np.ndarray
    loss_weight: np.ndarray
    image_of_token: np.ndarray


class Writer:
    """Collects tokens with their loss weight and image number."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._weights: list[float] = []
        self._images: list[int] = []
        self.images = 0

    def ids(self, ids: Sequence[int], weight: float = 0.0, image: int = -1) -> None:
        """Appends token ids."""
        self._tokens += ids
        self._weights += [weight] * len(ids)
        self._images += [image] * len(ids)

    def special(self, *names: str, weight: float = 0.0) -> None:
        """Appends special tokens by name."""
        self.ids([self._tokenizer.special[name] for name in names], weight)

    def image(self, merged: int) -> None:
        """Appends one image of `merged` visual tokens."""
        self.special("<|begin_of_image|>")
        self.ids([self._tokenizer.image] * merged, image=self.images)
        self.special("<|end_of_image|>")
        self.images += 1

    def pieces(self, pieces: Iterable[Piece], weights: Sequence[float], media: Callable[[], None]) -> None:
        """Appends a conversation; weights: of what each message's author says in it. media: writes the next image."""
        for piece in pieces:
            weight = weights[piece.by] if piece.by >= 0 else 0.0
            if piece.kind == "tag":
                self.special(piece.text, weight=weight)
            elif piece.kind == "text":
                self.ids(self._tokenizer.encode(piece.text), weight)
            elif piece.kind == "answer":
                self.ids(self._tokenizer.encode_with_specials(piece.text, BOX), weight)
            else:
                media()

    def done(self) -> Rendered:
        """The arrays of all that was written."""
        return Rendered(np.array(self._tokens, np.int32), np.array(self._weights, np.float32),
                        np.array(self._images, np.int32))


def boxed(answer: str) -> str:
    """The answer between box tokens."""
    return BOX[0] + answer + BOX[1]


def parse_answer(text: str) -> str:
    """The last boxed answer (also one cut off before its end token), else the whole text; stripped."""
    found = _BOX.findall(text)
    return (found[-1] if found else text).strip()


def render(
    messages: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    image_tokens: Sequence[int] = (),
    generation_prompt: bool = False,
    thinking: bool = False,
) -> Rendered:
    """Messages -> tokens.

    messages: {"role": system|user|assistant, "content": text or a list of {"type": "text", "text": ...} and
        {"type": "image"}}; images are numbered in reading order and take `image_tokens[i]` visual tokens each.
    generation_prompt: end with `<|assistant|></think>`, or with `<|assistant|><think>` for `thinking`, ready for
        sampling; the last message must not be assistant's.
    Raises UserError for an unknown role or part, when the user wrote nothing, and when images and placeholders differ
    in number.
    """
    if not messages:
        raise UserError("the conversation is empty; give at least one user message")
    placeholders = sum(part["type"] == "image" for message in messages for part in _parts(message))
    if placeholders != len(image_tokens):
        raise UserError(f"the messages hold {placeholders} image placeholders but {len(image_tokens)} images were "
                        'given; add one {"type": "image"} part for each image')
    asked = [part["text"] for m in messages if m["role"] == "user" for part in _parts(m) if part["type"] == "text"]
    if not "".join(asked).strip():
        raise UserError("the prompt is empty; write a question")
    if generation_prompt and messages[-1]["role"] == "assistant":
        raise UserError("the conversation already ends with an assistant message; end it with a user message")

    writer = Writer(tokenizer)
    pieces = COMPACT.pieces(messages, (), keeps=lambda n: False)
    writer.pieces(pieces, [1.0] * len(messages), lambda: writer.image(image_tokens[writer.images]))
    if generation_prompt:
        writer.special("<|assistant|>", *((COMPACT.thinking,) if thinking else COMPACT.no_thinking))
    elif messages[-1]["role"] == "assistant":
        writer.special("<|endoftext|>", weight=1.0)
    return writer.done()


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of a message as a checked list of parts."""
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"unknown role {role!r}; use {', '.join(ROLES)}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise UserError(f"the content of the {role} message is no text and no list of parts; give one of them")
    for part in parts:
        if part.get("type") not in ("text", "image") or (part["type"] == "text" and not isinstance(part["text"], str)):
            raise UserError(f"unknown part {part.get('type')!r} in a {role} message; use text or image")
        if part["type"] == "image" and role == "assistant":
            raise UserError("an assistant message cannot hold an image; move it to a user message")
    return list(parts)
