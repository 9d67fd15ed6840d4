"""Faces cover what is drawn with them; the vocabulary has the promised ids, coverage and normal form."""

from __future__ import annotations

import numpy as np
import pytest
import sentencepiece

from glmv_jax.data import corpus, documents, emoji, fonts
from glmv_jax.data.corpus.build_fonts import FACES
from glmv_jax.data.questions import DESCRIPTIONS, KINDS, Questions, read
from glmv_jax.data.tokenizer import SPECIALS


@pytest.fixture(scope="module")
def vocabulary() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(corpus.path("vocab.model")))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_faces_hold_every_character(split, lang):
    words = "".join(documents.body_words(lang)) + (read.ALPHABET if lang == "en" else read.CHARACTERS)
    for name in fonts.files(split, lang):
        font = fonts.load(name, 24)
        missing = bytes(font.getmask("\ue000"))  # what a face draws for a character that it lacks
        assert [c for c in sorted(set(words)) if c != " " and bytes(font.getmask(c)) == missing] == []
        assert font.getname()[0].startswith("GLMV ")  # the original names are reserved


def test_families_of_the_splits_differ():
    families = {split: set() for split in ("train", "heldout")}
    for _, split, lang, file, _, _ in FACES:
        stem = file.rsplit("/", 1)[1].split("-")[0].split(".")[0]
        families[split].add((lang, stem))
    assert not families["train"] & families["heldout"]
    assert len(families["train"] - {("zh", "NotoSansCJK")}) >= 4 and len(families["heldout"]) == 3


def test_a_face_of_the_split():
    rng = np.random.default_rng(0)
    drawn = {fonts.face("heldout", "en", rng, 12).getname()[0] for _ in range(40)}
    assert drawn == {fonts.load(name, 12).getname()[0] for name in fonts.files("heldout", "en")} and len(drawn) == 2


def test_special_tokens_come_first(vocabulary):
    assert len(vocabulary) == 4096
    assert [vocabulary.id_to_piece(i) for i in range(len(SPECIALS))] == list(SPECIALS)
    assert all(vocabulary.is_control(i) for i in range(len(SPECIALS)))
    assert (vocabulary.pad_id(), vocabulary.bos_id(), vocabulary.unk_id()) == (0, -1, len(SPECIALS))
    for special in SPECIALS:
        assert min(vocabulary.encode(special)) > len(SPECIALS)


def test_names_and_questions_need_no_bytes(vocabulary):
    texts = [e.name(lang) for e in emoji.load() for lang in emoji.LANGUAGES]
    for kind in KINDS:
        source = Questions([kind], "heldout")
        texts += [text for i in range(60) for text in (source[i].prompt, source[i].answer)]
    spelled = [t for t in texts if any(vocabulary.is_byte(i) or vocabulary.is_unknown(i) for i in vocabulary.encode(t))]
    assert spelled == []


def test_normal_form_digits_and_round_trip(vocabulary):
    assert vocabulary.encode("Ａ１２") == vocabulary.encode("A12")
    assert vocabulary.encode("907", out_type=str) == ["9", "0", "7"]
    for text in ("two  red stars ", "[[12,345,678,901]]", "“猫”的英文是cat。", "龘 <|image|> \U0001f600", ""):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    # No dummy space: pieces do not depend on what stood before.
    assert vocabulary.encode("cat", out_type=str) == ["cat"]


def test_languages_are_balanced(vocabulary):
    """Names of both languages cost about as many tokens, and neither language holds less than a third of the pieces."""
    cost = {lang: np.mean([len(vocabulary.encode(e.name(lang))) for e in emoji.load()]) for lang in emoji.LANGUAGES}
    assert max(cost.values()) < 1.5 * min(cost.values()) and max(cost.values()) < 5
    length = {lang: np.mean([len(e.name(lang)) for e in emoji.load()]) for lang in emoji.LANGUAGES}
    assert cost["en"] < 0.4 * length["en"] and cost["zh"] < 0.85 * length["zh"]  # words in both, not single characters
    pieces = [vocabulary.id_to_piece(i) for i in range(len(SPECIALS) + 257, 4096)]
    chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in piece) for piece in pieces)
    latin = sum(piece.strip("▁").isascii() and any(c.isalpha() for c in piece) for piece in pieces)
    assert min(chinese, latin) > len(pieces) / 3


@pytest.mark.parametrize("kind", list(KINDS))
def test_prompts_are_short(vocabulary, kind):
    source = Questions([kind], "train")
    assert max(len(vocabulary.encode(source[i].prompt)) for i in range(200)) <= 12
    longest = max(len(vocabulary.encode(source[i].answer)) for i in range(200))
    assert longest <= (40 if kind in DESCRIPTIONS else 20)
