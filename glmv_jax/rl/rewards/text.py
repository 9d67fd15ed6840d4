"""Rules for answers that are words or numbers. Pure functions of the boxed content and the sample."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.grade import RIGHT, WRONG, Rule, Score

# ASCII digits only, no exponent, no "nan", no "inf": a number is written out or it is not an answer. Commas only as
# thousands separators.
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})(?:\.[0-9]{1,15})?")


def normalise(text: str) -> str:
    """NFKC, casefold, runs of white space to one space, no space at the ends. "  Ｒｅｄ\\n" -> "red"."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def parse_number(text: str) -> float | None:
    """The number that `text` is as a whole, or None. "about 3", "1e3", "inf" and "3 4" are not numbers."""
    match = NUMBER.fullmatch(unicodedata.normalize("NFKC", text).strip())
    return float(match.group().replace(",", "")) if match else None


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Levenshtein distance of two strings (in code points) or lists, O(len(a) * len(b)) time and O(min) memory."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, char_a in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, char_b in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char_a != char_b))
    return row[-1]


def similarity(a: str, b: str) -> float:
    """1 - edit distance / the longer length, in [0, 1] (GLM-V report, arXiv 2507.01006, section 5.2, OCR reward)."""
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0


def exact(content: str, sample: Sample) -> Score:
    """Right iff the content equals the gold answer or one of meta["aliases"] after `normalise`."""
    golds = {normalise(gold) for gold in (sample.answer, *sample.meta.get("aliases", ()))}
    return RIGHT if normalise(content) in golds else WRONG


def reading(content: str, sample: Sample) -> Score:
    """Text recognition: the value is the similarity to the gold text, correct only when they are equal.

    Case counts, because a string in an image has one; only the compatibility forms and white space are unified.
    """
    read, gold = (" ".join(unicodedata.normalize("NFKC", text).split()) for text in (content, sample.answer))
    if len(read) > 4 * len(gold) + 16:  # its similarity is below 1/4 in any case: not worth the quadratic comparison
        return WRONG
    return Score(similarity(read, gold), read == gold)


def number(*, relative: float = 0.0, absolute: float = 0.0) -> Rule:
    """A rule for numbers: right within max(absolute, relative * |gold|) of the gold number.

    A sample narrows or widens it with meta["tolerance"] (absolute, in the unit of the answer). When the gold answer
    is not a number (the label of the tallest bar), the rule is `exact`.
    """

    def rule(content: str, sample: Sample) -> Score:
        gold = parse_number(sample.answer)
        if gold is None:
            return exact(content, sample)
        value = parse_number(content)
        if value is None:
            return WRONG
        tolerance = float(sample.meta.get("tolerance", max(absolute, relative * abs(gold))))
        # The last digits of a decimal such as 0.3 - 0.1 must not decide.
        return RIGHT if abs(value - gold) <= tolerance + 1e-9 * max(1.0, abs(gold)) else WRONG

    return rule
