"""A local index of texts, searched by words: BM25 (Robertson and Zaragoza 2009, The Probabilistic Relevance Framework,
equation 3.15), with one Chinese character as a word.
"""

from __future__ import annotations

import collections
import math
import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")
K1, B = 1.2, 0.75


def words(text: str) -> list[str]:
    """Lower case, compatibility forms unified, punctuation left out."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Index:
    """Texts to be found by the words they share with a query."""

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)
        self._counts = [collections.Counter(words(text)) for text in self.texts]
        self._lengths = [counts.total() for counts in self._counts]
        self._mean = sum(self._lengths) / max(1, len(self._lengths)) or 1.0
        self._holders = collections.Counter(word for counts in self._counts for word in counts)

    def score(self, query: str, n: int) -> float:
        """Of text n: the sum over the query's words of idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length))."""
        total = 0.0
        for word in set(words(query)):
            held, times = self._holders[word], self._counts[n][word]
            idf = math.log(1 + (len(self.texts) - held + 0.5) / (held + 0.5))
            length = self._lengths[n] / self._mean
            total += idf * times * (K1 + 1) / (times + K1 * (1 - B + B * length))
        return total

    def __call__(self, query: str, most: int = 3) -> list[str]:
        """The best texts that share a word with the query, the first of equals first."""
        scored = [(self.score(query, n), -n) for n in range(len(self.texts))]
        return [self.texts[-n] for score, n in sorted(scored, reverse=True)[:most] if score > 0]
