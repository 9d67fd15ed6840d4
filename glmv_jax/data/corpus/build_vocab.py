"""Trains the shipped sentencepiece vocabulary on the corpus itself.

4,096 pieces, as `data.vocabulary_training` makes them. Every character of the names and of what the sources draw is a
piece; the rarest of the keywords are not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from glmv_jax.data import corpus, drawing, emoji, vocabulary_training
from glmv_jax.data.corpus import build_fonts
from glmv_jax.data.pairs.fields import language
from glmv_jax.data.questions import KINDS, Questions
from glmv_jax.data.texts import Texts

PIECES = 4096
QUESTIONS_EACH, TEXTS, HELD_OUT_EACH = 2000, 6000, 100


def lines() -> Iterator[str]:
    """`_lines`, each cut after every Chinese colour: "红色圆形" is two pieces, so that any colour meets any shape."""
    colours = "|".join(colour.names["zh"] for colour in drawing.COLOURS.values())
    for line in _lines():
        yield from filter(None, re.split(f"(?<={colours})", line))


def _lines() -> Iterator[str]:
    """The training text: names and keywords of both languages, prompts and answers of every kind of question, texts.

    A prompt or caption that occurs n times is given sqrt(n) times: its words become pieces, whole prompts do not.
    Answers count in full: an answer of one piece is the easiest to learn.
    """
    for e in emoji.load():
        for lang in emoji.LANGUAGES:
            yield from e.texts[lang]
        yield e.name("en").lower()  # as stage 2 reads it
    seen: Counter[str] = Counter()
    for kind in KINDS:
        questions = Questions([kind], "train", seed=1)
        for i in range(QUESTIONS_EACH):
            sample = questions[i]
            if kind == "read":
                yield " ".join(sample.answer)  # the strings are random: their symbols are to stay apart
            elif sample.boxed:
                yield sample.answer
            seen.update(filter(None, (sample.prompt, "" if sample.boxed else sample.answer)))
    for text, count in sorted(seen.items()):
        yield from [text] * round(count**0.5)
    texts = Texts("train", seed=1)
    for i in range(TEXTS):
        yield texts[i].answer


def required_characters() -> str:
    """ASCII, the characters of every name and those that a source draws, in their NFKC form."""
    names = "".join(e.name(lang) for e in emoji.load() for lang in emoji.LANGUAGES)
    text = unicodedata.normalize("NFKC", build_fonts.characters("zh") + names)
    return "".join(sorted(set(text) - {" "}))


def heldout_lines() -> dict[str, list[str]]:
    """Prompts and texts of both languages that hold other concepts, to measure a vocabulary with."""
    samples = [Questions([kind], "heldout")[i] for kind in KINDS for i in range(HELD_OUT_EACH)]
    texts = [sample.prompt for sample in samples] + [Texts("heldout")[i].answer for i in range(10 * HELD_OUT_EACH)]
    found: dict[str, list[str]] = {lang: [] for lang in emoji.LANGUAGES}
    for text in filter(None, texts):
        found[language(text)].append(text)
    return found


def model(pieces: int = PIECES) -> bytes:
    """A vocabulary file of so many pieces."""
    return vocabulary_training.train(lines(), pieces, 0.999, required_characters())


def build() -> str:
    """Writes vocab.model; returns a line of counts."""
    corpus.VOCABULARY.write_bytes(model())
    return f"{PIECES} pieces, {corpus.VOCABULARY.stat().st_size / 1e3:.0f} kB"
