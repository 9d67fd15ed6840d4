"""Trains a sentencepiece vocabulary on Chinese and English of equal weight.

Byte-pair merges, NFKC, digits one by one, bytes for what is not covered. Merges rather than a unigram model: with few
pieces that leaves texts half as long again, merges come out the same each time, and GLM's and Gemma's vocabularies are
of merges too. No dummy space is put before a text, so a text encodes to the same pieces after a special token as alone,
and `decode(encode(text))` is the NFKC form of the text. The special tokens of GLM are control pieces: no text encodes
to them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import io
import pathlib
import re
import string
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import sentencepiece

from glmv_jax.data.pairs.fields import language
from glmv_jax.data.tokenizer import SPECIALS
from glmv_jax.typing import UserError

PIECES = 64_000
LIMIT = 64_000_000
HELD_OUT = 100  # one text in so many measures what comes out, and is not trained on
HELD_OUT_MOST = 5_000  # of a language


def train(lines: Iterable[str], pieces: int, coverage: float, required: str) -> bytes:
    """A sentencepiece model file.

    coverage: share of the characters that become pieces; `required` are pieces in any case.
    Raises: UserError when the lines do not yield so many pieces, or these are too few for their characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=pieces,
            character_coverage=coverage,
            required_chars=required,
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
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = re.sub(r".*\] ", "", str(error).splitlines()[0])
        raise UserError(f"sentencepiece makes no {pieces} pieces of these texts ({reason}); give another --size, or "
                        "more --text") from None  # fmt: skip
    return model.getvalue()


@dataclasses.dataclass
class Sample:
    """Of one language: texts to train on and texts to measure with. seen, size: texts and bytes that were read."""

    train: list[str]
    heldout: list[str]
    seen: int = 0
    size: int = 0


def sample(texts: Iterable[str], limit: int = LIMIT, seed: int = 0) -> dict[str, Sample]:
    """A sample by language of texts that are read once and need not fit into memory; the same for a seed.

    limit: bytes (UTF-8) of all languages together that are trained on; each may have half of them.
    """
    rng = np.random.default_rng(seed)
    found = {lang: (Sample([], []), _Reservoir(limit // 2), _Reservoir(HELD_OUT_MOST)) for lang in ("en", "zh")}
    for text in texts:
        size = len(text.encode())
        kept, training, measuring = found[language(text)]
        kept.seen, kept.size = kept.seen + 1, kept.size + size
        # By its words, not by its place: a text that occurs twice is not on both sides.
        if int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()) % HELD_OUT == 0:
            measuring.add(rng.random(), 1, text)
        else:
            training.add(rng.random(), size, text)
    for kept, training, measuring in found.values():
        kept.train, kept.heldout = training.texts(), measuring.texts()
    return {lang: kept for lang, (kept, _, _) in found.items() if kept.train}


class _Reservoir:
    """The texts of smallest keys whose sizes together are at most `room`: a fair draw when keys are random."""

    def __init__(self, room: int):
        self.room, self.used = room, 0
        self._heap: list[tuple[float, int, str]] = []

    def add(self, key: float, size: int, text: str) -> None:
        if self.used + size > self.room and self._heap and key > -self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-key, size, text))
        self.used += size
        while self.used > self.room:
            self.used -= heapq.heappop(self._heap)[1]

    def texts(self) -> list[str]:
        return [text for _, _, text in sorted(self._heap, reverse=True)]


def balanced(samples: dict[str, Sample]) -> list[str]:
    """Texts to train on, as many bytes (UTF-8) of each language: those of the smaller ones are repeated.

    Bytes, because they weigh what is said about alike: a Chinese character has three, and names of the same things
    have 3.3 times as many letters in English as characters in Chinese (the shipped corpus).
    """
    sizes = {lang: sum(len(text.encode()) for text in s.train) for lang, s in samples.items()}
    lines = []
    for lang, s in samples.items():
        wanted = max(sizes.values())
        whole, rest = divmod(wanted, sizes[lang])
        lines += s.train * whole
        for text in s.train:
            rest -= len(text.encode())
            if rest < 0:
                break
            lines.append(text)
    return lines


@dataclasses.dataclass(frozen=True)
class Fertility:
    """What texts of a language become. tokens: a character of Chinese, a word of English; bytes: the share of tokens
    that are bytes of characters without a piece; longest: tokens that 99 % of the texts do not exceed."""

    texts: int
    tokens: float
    bytes: float
    longest: int


def fertility(model: sentencepiece.SentencePieceProcessor, texts: Sequence[str], lang: str) -> Fertility:
    """Of texts that were not trained on."""
    ids = [model.encode(text) for text in texts]
    total = sum(map(len, ids))
    units = sum(len("".join(text.split())) if lang == "zh" else len(text.split()) for text in texts)
    spelt = sum(model.is_byte(i) for text in ids for i in text)
    longest = int(np.ceil(np.quantile([len(text) for text in ids], 0.99)))
    return Fertility(len(texts), total / max(1, units), spelt / max(1, total), longest)


def report(model: bytes, heldout: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines for a person: the fertility of each language, and the row that fits it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    lines = []
    for lang, texts in heldout.items():
        if not texts:
            lines.append(f"{lang}: too few texts to hold any out")
            continue
        f = fertility(processor, texts, lang)
        unit = "character" if lang == "zh" else "word"
        lines.append(f"{lang}: {f.tokens:.2f} tokens a {unit}, {f.bytes:.1%} of them bytes, 99% of texts within "
                     f"{f.longest} tokens ({f.texts} held-out texts)")  # fmt: skip
    return lines


def run(texts: Iterable[str], out: str | pathlib.Path, pieces: int, limit: int, seed: int) -> list[str]:
    """Trains on a balanced sample of `texts`, writes the model to `out`, and returns what to tell.

    Raises: UserError when there is no text.
    """
    samples = sample(texts, limit, seed)
    if not samples:
        raise UserError("no text to train on; give files with --text")
    told = [f"{lang}: {s.seen} texts of {s.size / 1e6:.1f} MB read, {len(s.train)} trained on"
            for lang, s in samples.items()]  # fmt: skip
    told += [f"only {lang}: nothing to balance it with" for lang in samples if len(samples) == 1]
    # Rare characters are many in Chinese: a smaller share than this would leave names to bytes.
    ascii_ = "".join(c for c in string.printable if not c.isspace())
    model = train(balanced(samples), pieces, 0.9995, ascii_)
    write(model, out)
    return told + report(model, {lang: s.heldout for lang, s in samples.items()})


def write(model: bytes, out: str | pathlib.Path) -> None:
    """The model file, its folder made when missing."""
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model)
