"""A vocabulary from a user's files: balance, determinism, what is held out, and what can be wrong with the files."""

from __future__ import annotations

import gzip
import json
import random

import numpy as np
import pytest
import sentencepiece

from glmv_jax import cli
from glmv_jax.data import text_files, vocabulary, vocabulary_training
from glmv_jax.data.corpus import build_vocab
from glmv_jax.data.pairs.fields import language
from glmv_jax.data.text_files import Texts
from glmv_jax.data.texts import Texts as Shipped
from glmv_jax.data.tokenizer import SPECIALS, Tokenizer
from glmv_jax.typing import UserError


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    """Definitions, translations and sums of the shipped corpus by language; different ones, most are English."""
    source = Shipped("train", seed=3)
    found = {"en": [], "zh": []}
    for i in range(9000):
        text = source[i].answer
        found[language(text)].append(text)
    return {lang: sorted(set(texts)) for lang, texts in found.items()}


def processor(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def words_in_chinese(model) -> int:
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    return sum(len(piece) > 1 and all("\u4e00" <= c <= "\u9fff" for c in piece) for piece in pieces)


def test_a_vocabulary_of_a_corpus_that_is_mostly_english(tmp_path, corpus):
    """1 Chinese text to 10 English ones: Chinese still has its share of the pieces, and all is repeatable."""
    texts = corpus["en"] + corpus["zh"][: len(corpus["en"]) // 10]
    random.Random(0).shuffle(texts)
    told = vocabulary_training.run(texts, tmp_path / "a.model", 2500, 10**6, 0)
    vocabulary_training.run(iter(texts), tmp_path / "sub" / "b.model", 2500, 10**6, 0)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "sub" / "b.model").read_bytes()
    assert any(line.startswith("zh: ") and "tokens a character" in line for line in told)
    assert any(line.startswith("en: ") and "tokens a word" in line for line in told)

    balanced, words = Tokenizer(tmp_path / "a.model"), processor(tmp_path / "a.model")
    assert balanced.vocab_size == 2500 and [balanced.special[n] for n in SPECIALS] == list(range(len(SPECIALS)))
    (tmp_path / "c.model").write_bytes(vocabulary_training.train(texts, 2500, 0.9995, ""))
    as_it_is = processor(tmp_path / "c.model")
    assert words_in_chinese(words) > 2 * words_in_chinese(as_it_is) > 0


def test_bytes_are_balanced_by_repeating():
    samples = {"en": vocabulary_training.Sample(["hello", "world", "again"], []),
               "zh": vocabulary_training.Sample(["猫"], [])}  # fmt: skip
    lines = vocabulary_training.balanced(samples)
    assert lines == ["hello", "world", "again", "猫", "猫", "猫", "猫", "猫"]


def test_the_sample_is_fair_bounded_and_keeps_equal_texts_on_one_side():
    texts = [f"text number {i % 4000}" for i in range(12_000)] + ["猫"] * 3
    one = vocabulary_training.sample(iter(texts), 40_000, 0)["en"]
    assert sum(map(len, one.train)) <= 20_000 and sum(map(len, one.train)) > 19_900
    assert not set(one.train) & set(one.heldout) and one.seen == 12_000 and 20 <= len(set(one.heldout)) <= 70
    place = np.array([int(text.split()[-1]) for text in one.train])
    assert abs(place.mean() - 2000) < 150  # the middle: neither the first nor the last of them
    again = vocabulary_training.sample(iter(texts), 40_000, 0)["en"]
    other = vocabulary_training.sample(iter(texts), 40_000, 1)["en"]
    assert again.train == one.train and again.heldout == one.heldout and other.train != one.train


@pytest.mark.parametrize("text, lang", [
    ("iPhone 手机壳", "zh"), ("Beijing (北京) is large", "en"), ("12 + 3", "en"), ("", "en"), ("𠮷野家", "zh"),
])  # fmt: skip
def test_the_language_of_a_text(text, lang):
    assert language(text) == lang


def test_fertility_by_hand(tmp_path):
    words = processor(build_vocab.corpus.VOCABULARY)
    texts = ["a red heart", "two"]
    ids = [words.encode(text) for text in texts]
    found = vocabulary_training.fertility(words, texts, "en")
    assert found.tokens == pytest.approx(sum(map(len, ids)) / 4) and found.texts == 2
    spelt = vocabulary_training.fertility(words, ["龘"], "zh")
    assert spelt.tokens == 3 and spelt.bytes == 1.0


def test_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \r\n" + "x" * 4500, encoding="utf-8")
    records = [{"caption": "three", "url": "u"}, {"captions": ["four", "五"]}, {"url": "u"}, {"text": 3}, ["no"]]
    broken = "".join(json.dumps(r) + "\n" for r in records) + "{broken\n"
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(broken)
    (tmp_path / "c.tsv").write_text('file\tcaption\tzh\n1.png\tsix "\t七\n2.png\t\t八\n3.png\n', encoding="utf-8")
    (tmp_path / "d.csv").write_text('text,n\n"nine, ten",1\n', encoding="utf-8")
    (tmp_path / "e.png").write_bytes(b"\x89PNG")
    texts = Texts([tmp_path])
    want = ["one", "two", "x" * 2000, "x" * 2000, "x" * 500, "three", "four", "五", 'six "', "七", "八", "nine, ten"]
    assert list(texts) == want and texts.skipped == 5
    assert list(texts) == want and texts.skipped == 5  # may be read again
    assert list(Texts([tmp_path / "c.tsv"], "1")) == ["file", "1.png", "2.png", "3.png"]
    assert list(Texts([tmp_path / "c.tsv"], "zh")) == ["七", "八"]
    assert list(Texts([tmp_path / "b.jsonl.gz"], "url")) == ["u", "u"]


def test_what_can_be_wrong_with_files(tmp_path):
    with pytest.raises(UserError, match="none.txt does not exist"):
        list(Texts([tmp_path / "none.txt"]))
    with pytest.raises(UserError, match="no .txt, .jsonl, .tsv, .csv in this folder"):
        list(Texts([tmp_path]))
    (tmp_path / "t.tsv").write_text("u1\ta cat\n", encoding="utf-8")
    for field in ("", "caption", "3", "0"):
        with pytest.raises(UserError, match="t.tsv: no column .* among u1, a cat; give --field"):
            list(Texts([tmp_path / "t.tsv"], field))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"many lines\n" * 1000)[:30])
    with pytest.raises(UserError, match="cut.txt.gz cannot be read"):
        list(Texts([tmp_path / "cut.txt.gz"]))
    with pytest.raises(UserError, match="no text to train on"):
        vocabulary_training.run([], tmp_path / "x.model", 300, 10**6, 0)
    with pytest.raises(UserError, match="sentencepiece makes no 9000 pieces of these texts .*give another --size"):
        vocabulary_training.run(["a cat", "一只猫"] * 50, tmp_path / "x.model", 9000, 10**6, 0)
    assert not (tmp_path / "x.model").exists() and text_files.FIELDS


def test_the_shipped_vocabulary_is_measured_on_what_it_was_not_trained_on():
    """Training it takes too long here (8 s of a free core)."""
    lines = vocabulary_training.report(build_vocab.corpus.VOCABULARY.read_bytes(), build_vocab.heldout_lines())
    assert len(lines) == 2 and all("held-out texts" in line for line in lines)


def test_the_command(tmp_path, capsys, corpus):
    """From files to a file that the chat dialect and stage 2 can use, with the overrides that go with it."""
    rows = [{"caption": en, "zh": zh} for en, zh in zip(corpus["en"], corpus["zh"])]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "new" / "v.model"
    args = ["train-vocabulary", "--text", str(tmp_path / "pairs.jsonl"), "--size", "2500", "--out", str(out)]
    assert cli.main(args) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1].endswith(f"--config.data.vocabulary={out} --config.model.text.vocab=2500") and len(told) == 6
    assert Tokenizer(out).vocab_size == vocabulary.load(out).vocab_size == 2500
    assert cli.main([*args[:2], str(tmp_path / "none"), *args[3:]]) == 2
    assert "glmv train-vocabulary: --text" in capsys.readouterr().err
