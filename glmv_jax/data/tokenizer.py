"""Text to token ids with a sentencepiece vocabulary whose special tokens no user text can produce.

Special tokens are control pieces: encoding text never yields their ids, not even when the text spells "<|image|>".
They enter only by id (`special`) or through `encode_with_specials`, which names those it lets in.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from glmv_jax.data.vocabulary import sentencepiece_model
from glmv_jax.typing import UserError

SPECIALS = (
    "<pad>", "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|video|>", "<|end_of_video|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<tool_response>", "</tool_response>", "<|begin_of_box|>", "<|end_of_box|>",
)  # fmt: skip
BOX = ("<|begin_of_box|>", "<|end_of_box|>")
SHIPPED = pathlib.Path(__file__).resolve().parent / "corpus" / "vocab.model"


class Tokenizer:
    """A sentencepiece vocabulary (default: the shipped one) with the special tokens of the GLM chat dialect.

    special: id of every special token by name.   vocab_size: number of ids.
    pad, eos, image: their ids.                    stops: ids that end an assistant turn.
    Raises UserError when the file is missing or lacks a special token.
    """

    def __init__(self, path: str | pathlib.Path | None = None):
        self.path = pathlib.Path(path or SHIPPED)
        self._model = sentencepiece_model(self.path)
        self.vocab_size = self._model.vocab_size()
        self.special = {name: self._model.piece_to_id(name) for name in SPECIALS}
        missing = [name for name, i in self.special.items() if not self._model.is_control(i)]
        if missing:
            raise UserError(f"vocabulary {str(self.path)!r} lacks the control token {missing[0]}; train it with "
                            "glmv_jax.data.tokenizer.SPECIALS as control symbols")
        self._names = {i: name for name, i in self.special.items()}
        self.pad, self.eos, self.image = (self.special[n] for n in ("<pad>", "<|endoftext|>", "<|image|>"))
        self.stops = frozenset(self.special[n] for n in ("<|endoftext|>", "<|user|>", "<|observation|>"))

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.path,)  # the model file is read again in a worker process

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special id."""
        return self._model.encode(text)

    def encode_with_specials(self, text: str, allowed: Iterable[str] = BOX) -> list[int]:
        """Ids of trusted text in which the named special tokens count as such; all others stay plain text."""
        allowed = tuple(allowed)
        unknown = [name for name in allowed if name not in self.special]
        if unknown:
            raise UserError(f"{unknown[0]!r} is no special token; choose from {', '.join(SPECIALS)}")
        if not any(name in text for name in allowed):
            return self.encode(text)
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, allowed)) + ")", text):
            ids += [self.special[part]] if part in allowed else self.encode(part)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, keep_special: bool = False) -> str:
        """Text of ids; special tokens are dropped or, with `keep_special`, written by name. Ids must be in range."""
        text: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if i in self._names:
                text.append(self._model.decode(run))
                run = []
                text.append(self._names[i] if keep_special else "")
            else:
                run.append(i)
        return "".join(text) + self._model.decode(run)


def open_tokenizer(path: str | pathlib.Path | None = None) -> Any:
    """The vocabulary in a file: a `tokenizer.json` (see `tokenizer_json`) or sentencepiece; None: the shipped one."""
    if path and str(path).endswith(".json"):
        from glmv_jax.data.tokenizer_json import JsonTokenizer

        return JsonTokenizer(path)
    return Tokenizer(path)
