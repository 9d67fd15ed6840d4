"""Trains the shipped sentencepiece vocabulary on the corpus itself.

4,096 pieces, byte-pair merges, NFKC, digits one by one, bytes for what is not covered. Every character of the names and
of what the sources draw is a piece; the rarest of the keywords are not. Merges rather than a unigram model, which with
so few pieces leaves the prompts half as long again. No dummy space is put before a text, so a text encodes to the same
pieces after a special token as alone, and `decode(encode(text))` is the NFKC form of the text. The special tokens are
control pieces: no text encodes to them.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

import sentencepiece

from glmv_jax.data import corpus, drawing, emoji
from glmv_jax.data.corpus import build_fonts
from glmv_jax.data.questions import KINDS, Questions
from glmv_jax.data.texts import Texts
from glmv_jax.data.tokenizer import SPECIALS

PIECES = 4096
QUESTIONS_EACH, TEXTS = 2000, 6000


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


def build() -> str:
    """Writes vocab.model; returns a line of counts."""
    model = io.BytesIO()
    text = list(lines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=0.999,
        required_chars=required_characters(),
        normalization_rule_name="nfkc",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        # The first two special tokens are sentencepiece's own padding and end; the unknown piece follows the last.
        pad_id=0,
        pad_piece=SPECIALS[0],
        eos_id=1,
        eos_piece=SPECIALS[1],
        bos_id=-1,
        unk_id=len(SPECIALS),
        control_symbols=list(SPECIALS[2:]),
        max_sentence_length=8192,
        minloglevel=1,
    )
    corpus.VOCABULARY.write_bytes(model.getvalue())
    return f"{len(text)} lines, {PIECES} pieces, {len(model.getvalue()) / 1e3:.0f} kB"
