"""Vocabulary files of any origin: a sentencepiece .model, or a tokenizer.json of Hugging Face's `tokenizers`.

Only what plain text needs: ids of a text, never a special id, and the ids of end and padding. Special tokens of the
chat dialect are `data.tokenizer`'s subject, how texts become rows is `data.text_rows`'.
"""

from __future__ import annotations

import pathlib
from typing import Protocol

import sentencepiece

from glmv_jax.typing import UserError

# What folders of public checkpoints call theirs; the original sentencepiece model before its translation.
FILES = ("spiece.model", "tokenizer.model", "tokenizer.json")
_END = ("<eos>", "</s>", "<|endoftext|>")
_PADDING = ("<pad>", "[PAD]", *_END)


class Vocabulary(Protocol):
    """vocab_size: number of ids. eos, pad: ids of end and padding (of the end again where there is no padding)."""

    vocab_size: int
    eos: int
    pad: int

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no special one among them, not even when the text spells one."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special ones left out."""


def load(path: str | pathlib.Path) -> Vocabulary:
    """The vocabulary in a file, told by its ending, or in a folder that holds one of FILES.

    Raises: UserError when there is none, it cannot be read, or it has no token for the end of a text.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no vocabulary here (none of {', '.join(FILES)}); give data.vocabulary a file")
        path = found[0]
    return TokenizersJson(path) if path.suffix == ".json" else SentencePiece(path)


def sentencepiece_model(path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """The model in a file; UserError when there is none."""
    if not path.is_file():
        raise UserError(f"vocabulary {str(path)!r} does not exist; give the path of a sentencepiece .model")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise UserError(f"vocabulary {str(path)!r} is not a sentencepiece model; give another file") from None


class SentencePiece:
    """A sentencepiece model; see `Vocabulary`."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self._model = sentencepiece_model(self.path)
        self.vocab_size, self.eos = self._model.vocab_size(), self._model.eos_id()
        if self.eos < 0:
            raise UserError(f"vocabulary {str(self.path)!r} has no end token; train it with an eos_id")
        self.pad = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)  # the file is read again in a worker process

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class TokenizersJson:
    """A tokenizer.json; see `Vocabulary`. What it says of templates, padding and truncation is not used."""

    def __init__(self, path: str | pathlib.Path):
        try:
            import tokenizers
        except ImportError:
            raise UserError("tokenizer.json needs the tokenizers package; pip install 'glmv_jax[hf]'") from None
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"vocabulary {str(self.path)!r} does not exist; give the path of a tokenizer.json")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises nothing more exact
            raise UserError(f"vocabulary {str(self.path)!r} cannot be read ({error}); download it again") from None
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # "<eos>" in a text is text, as sentencepiece has it
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)
        self.eos, self.pad = self._first(_END), self._first(_PADDING)

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def _first(self, names: tuple[str, ...]) -> int:
        ids = [i for i in map(self._model.token_to_id, names) if i is not None]
        if not ids:
            raise UserError(f"vocabulary {str(self.path)!r} has none of the end tokens {', '.join(names)}")
        return ids[0]
