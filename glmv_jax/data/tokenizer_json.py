"""Text to token ids with the `tokenizer.json` of a public checkpoint, behind the interface of `tokenizer.Tokenizer`.

There the special tokens of a chat are "added tokens", which the library finds in any text, a user's too. Here plain
text never yields one: where it spells one, it is cut behind the first letter, so that no piece holds the whole.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from glmv_jax.data.tokenizer import BOX
from glmv_jax.data.vocabulary import TokenizersJson
from glmv_jax.typing import UserError


class JsonTokenizer(TokenizersJson):
    """A `tokenizer.json`. Attributes are those of `tokenizer.Tokenizer`; `image` is None where there is no `<|image|>`.

    special: id of every added token by name; what a chat needs and a tokenizer lacks raises UserError when asked for.
    Raises UserError as `TokenizersJson`.
    """

    def __init__(self, path: str | pathlib.Path):
        super().__init__(path)
        self._names = {i: token.content for i, token in self._model.get_added_tokens_decoder().items()}
        self.special = _Specials(self.path, {name: i for i, name in self._names.items()})
        names = sorted((n for n in self.special if len(n) > 1), key=len, reverse=True)
        self._spelt = re.compile("(?=(?:" + "|".join(map(re.escape, names)) + "))") if names else None
        self.image = self.special.get("<|image|>")
        stops = ("<|endoftext|>", "<|user|>", "<|observation|>")
        self.stops = frozenset(self.special[name] for name in stops if name in self.special)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special id."""
        cuts = [found.start() + 1 for found in self._spelt.finditer(text)] if self._spelt else []
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        return [i for piece in pieces for i in self._model.encode(piece, add_special_tokens=False).ids]

    def encode_with_specials(self, text: str, allowed: Iterable[str] = BOX) -> list[int]:
        """Ids of trusted text in which the named special tokens count as such; all others stay plain text."""
        allowed = sorted(allowed, key=len, reverse=True)
        for name in allowed:
            _ = self.special[name]
        if not any(name in text for name in allowed):
            return self.encode(text)
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, allowed)) + ")", text):
            ids += [self.special[part]] if part in allowed else self.encode(part)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, keep_special: bool = False) -> str:
        """Text of ids; special tokens are dropped or, with `keep_special`, written by name. An id that no token has
        (models have more rows than their tokenizer) is nothing."""
        text: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if i in self._names:
                text += [self._model.decode(run, skip_special_tokens=False), self._names[i] if keep_special else ""]
                run = []
            else:
                run.append(i)
        return "".join(text) + self._model.decode(run, skip_special_tokens=False)


class _Specials(dict):
    def __init__(self, path: pathlib.Path, ids: dict[str, int]):
        super().__init__(ids)
        self._path = path

    def __missing__(self, name: str) -> int:
        raise UserError(f"{self._path} has no token {name!r}; take the tokenizer of a GLM checkpoint")
