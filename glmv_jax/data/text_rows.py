"""Texts of stage 2 as rows of ids, in the convention of the tower that reads them.

Both kinds have `side_by_side(texts, length)`, a row of several texts, and `fixed(text, length)`, a row of one; id 0
after the last `eos` is padding.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from glmv_jax.data.vocabulary import Vocabulary
from glmv_jax.typing import UserError

_CHARACTERS = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]|[^\u3400-\u4dbf\u4e00-\u9fff]+")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TextRows(Protocol):
    """vocabulary: where the ids come from."""

    vocabulary: Vocabulary

    def side_by_side(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """A row of ids and its segments (1, 2, ..., one a text), int32 [length] each."""

    def fixed(self, text: str, length: int) -> np.ndarray:
        """The ids of a row of one text, int32 [length]."""


class SharedRows:
    """For our own text tower: each text ends with `eos`, the next one follows at once, padding (0) has segment 0.

    Texts are read in NFKC and lower case. split_chinese: one character at a time, so that an unseen name is made of
    what was seen in others; for small corpora. Otherwise the vocabulary's own words.
    """

    def __init__(self, vocabulary: Vocabulary, split_chinese: bool = True):
        self.vocabulary, self.split_chinese = vocabulary, split_chinese
        if not vocabulary.eos:
            raise UserError("the vocabulary's end token has id 0, which is padding here; give another vocabulary")

    def side_by_side(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """While the texts are too long together the longest of them is cut; each keeps its `eos`.

        Raises: UserError for a row that is too short for the `eos` alone.
        """
        if length < len(texts):
            raise UserError(f"a row of {length} tokens cannot hold {len(texts)} texts; lengthen the row")
        ids = [self._encode(text) for text in texts]
        room = length - len(texts)
        while sum(map(len, ids)) > room:
            max(ids, key=len).pop()
        tokens = [i for text in ids for i in (*text, self.vocabulary.eos)]
        segments = [n for n, text in enumerate(ids, start=1) for _ in range(len(text) + 1)]
        rest = length - len(tokens)
        return np.array(tokens + [0] * rest, np.int32), np.array(segments + [0] * rest, np.int32)

    def fixed(self, text: str, length: int) -> np.ndarray:
        return self.side_by_side([text], length)[0]

    def _encode(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFKC", text).lower()
        parts = _CHARACTERS.findall(text) if self.split_chinese else [text]
        return [i for part in parts for i in self.vocabulary.encode(part)]


class PaddedRows:
    """For SigLIP's text towers, which read padding as any token: each text fills an equal part of the row.

    SigLIP 2 (big_vision `lower -> tok(length, bos="no", eos="sticky")`): lower case, ids, `eos` (when cut too, in the
    last place), and the vocabulary's padding. first=True, SigLIP: ASCII punctuation is dropped and runs of white space
    are one space (`canonicalize`), and the padding is `eos`.
    """

    def __init__(self, vocabulary: Vocabulary, first: bool = False):
        self.vocabulary, self.first = vocabulary, first
        self._padding = vocabulary.eos if first else vocabulary.pad

    def side_by_side(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Raises: UserError for a length that the texts do not divide."""
        each, rest = divmod(length, len(texts))
        if rest or not each:
            raise UserError(f"a row of {length} tokens does not divide into {len(texts)} texts; change the row")
        tokens = np.full((len(texts), each), self._padding, np.int32)
        for row, text in zip(tokens, texts):
            ids = self._encode(text)[: each - 1] + [self.vocabulary.eos]
            row[: len(ids)] = ids
        return tokens.reshape(-1), np.repeat(np.arange(1, len(texts) + 1, dtype=np.int32), each)

    def fixed(self, text: str, length: int) -> np.ndarray:
        return self.side_by_side([text], length)[0]

    def _encode(self, text: str) -> list[int]:
        text = text.lower()
        if self.first:
            text = " ".join(text.translate(_NO_PUNCTUATION).split())
        return self.vocabulary.encode(text)
