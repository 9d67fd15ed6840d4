"""Penalties for how an answer is written: languages that mix, text that repeats itself, a box where none belongs.

Pure functions, linear in the length of the answer. They are gates or small weights beside a verifier, never a reward
alone: the best style is an empty answer's.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.grade import BEGIN_BOX, END_BOX, Grade

# What is quoted or computed belongs to no language: code, formulas, boxes, addresses.
_NEUTRAL = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$]*\$|\\[A-Za-z]+"
    + f"|{re.escape(BEGIN_BOX)}.*?(?:{re.escape(END_BOX)}|\\Z)|https?://\\S+|<[^<>\n]*>",
    re.DOTALL,
)
# Letters of one writing; Chinese and Japanese share characters, Japanese is told by its kana.
_WRITINGS = {"CJK": "han", "HIRAGANA": "kana", "KATAKANA": "kana", "HANGUL": "hangul"}
_PIECE = re.compile(r"[^\W_\u2e80-\u9fff\uac00-\ud7ff]+|[^\s]")


@functools.lru_cache(4096)
def writing(letter: str) -> str:
    """The writing a letter belongs to: "latin", "han", "kana", "cyrillic", ...; "" for what is no letter."""
    if not letter.isalpha():
        return ""
    word = unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]
    return _WRITINGS.get(word, word.lower())


def writings(text: str) -> Counter[str]:
    """Letters of a text by writing, of what is not code, formula, box or address."""
    counts: Counter[str] = Counter()
    for letter, number in Counter(_NEUTRAL.sub(" ", text)).items():
        counts[writing(letter)] += number
    counts.pop("", None)
    return counts


def foreign(text: str, sample: Sample, latin: float) -> float:
    """The share of letters in writings that neither the question nor its gold answer uses, in [0, 1].

    Latin letters are names and units in any language: of them only what is above the share `latin` counts.
    """
    counts = writings(text)
    total = sum(counts.values())
    if not total:
        return 0.0
    asked = set(writings(sample.prompt)) | set(writings(sample.answer))
    asked = asked or set(counts.most_common(1)[0][:1])  # a question without letters may be answered in any
    strange = sum(number for name, number in counts.items() if name not in asked and name != "latin")
    # Where the question is Chinese, "mAP" in it does not make English the language of the answer.
    main = writings(sample.prompt).most_common(1)
    if main and main[0][0] != "latin":
        strange += max(0.0, counts["latin"] - latin * total)
    return strange / total


def repeated(text: str, span: int) -> float:
    """The share of spans of `span` words (characters where words are not spaced) that were there before, in [0, 1]."""
    pieces = _PIECE.findall(text.casefold())
    spans = [tuple(pieces[i : i + span]) for i in range(len(pieces) - span + 1)]
    return 1.0 - len(set(spans)) / len(spans) if spans else 0.0


def has_box(text: str) -> bool:
    """Whether a text holds any box token."""
    return BEGIN_BOX in text or END_BOX in text


def style(
    text: str,
    sample: Sample,
    *,
    mixed: float | None = 0.05,
    latin: float = 0.5,
    repetition: float | None = 0.3,
    span: int = 8,
    box: bool | None = None,
) -> Grade:
    """1 when an answer is well written, else 0 with what is wrong among the flags.

    mixed:      the share of `foreign` letters above which languages mix ("mixed_language"); None: not looked at.
    repetition: the share of `repeated` spans above which it repeats itself ("repetition"); None: not looked at.
                At least as many spans as `span` have to be repeats, so that short answers may rhyme.
    box:        False: any box token is wrong ("unexpected_box"), for data without a verifiable answer, which would
                otherwise learn to look verifiable (GLM-V, arXiv 2507.01006, section 5.2). True: one is needed
                ("no_box").
    """
    flags = []
    if mixed is not None and foreign(text, sample, latin) > mixed:
        flags.append("mixed_language")
    if repetition is not None:
        share, count = repeated(text, span), max(0, len(_PIECE.findall(text)) - span + 1)
        if share > repetition and share * count >= span:
            flags.append("repetition")
    if box is not None and has_box(text) != box:
        flags.append("no_box" if box else "unexpected_box")
    value = float(not flags)
    return Grade(value, not flags, {"style": value}, tuple(flags))
