"""Stage 2's texts as rows: our convention, and SigLIP's against the tokenizer classes of transformers."""

from __future__ import annotations

import pickle
import sys
import unicodedata

import numpy as np
import pytest

from glmv_jax.data import vocabulary
from glmv_jax.data.text_rows import PaddedRows, SharedRows
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError
from tests.data.vocabularies import gemma_like, sentencepiece_file

TEXTS = ["A Photo of a CAT", "一只猫的照片", "Two 猫, 红心!", "", "ＦＵＬＬ　Width １２", "a  b\tc\n",
         "İstanbul ñ é 😀", "cats " * 40]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


# --- our tower --------------------------------------------------------------------------------------------------------


def test_one_text_a_row(tokenizer):
    rows = SharedRows(tokenizer)
    row = rows.fixed("ＲＥＤ Heart", 16)
    expected = tokenizer.encode("red heart")
    assert row.dtype == np.int32 and row.shape == (16,)
    assert row[: len(expected)].tolist() == expected
    assert row[len(expected)] == tokenizer.eos and not row[len(expected) + 1:].any()
    cut = rows.fixed("one two three four five six seven", 4)
    assert cut.tolist() == tokenizer.encode("one two three four five six seven")[:3] + [tokenizer.eos]
    assert rows.fixed("", 3).tolist() == [tokenizer.eos, 0, 0]


def test_chinese_by_characters_or_by_words(tokenizer):
    text = "红色圆形 OK"
    row, words = SharedRows(tokenizer).fixed(text, 16), SharedRows(tokenizer, split_chinese=False).fixed(text, 16)
    assert row[:4].tolist() == [tokenizer.encode(c)[0] for c in "红色圆形"]
    whole = tokenizer.encode("红色圆形 ok")
    assert words[: len(whole) + 1].tolist() == [*whole, tokenizer.eos] and len(whole) < (row > 1).sum()
    assert tokenizer.decode(row) == tokenizer.decode(words) == "红色圆形 ok"


def test_texts_side_by_side(tokenizer):
    """Each text as `fixed` writes it; too long together, the longest gives way; a row too short is refused."""
    rows, short, long = SharedRows(tokenizer), "heart", "one two three four five six seven"
    tokens, segments = rows.side_by_side([short, long], 24)
    for n, text in enumerate((short, long), start=1):
        alone = rows.fixed(text, 24)
        assert tokens[segments == n].tolist() == alone[alone != 0].tolist()
    assert (tokens[segments == 0] == 0).all()
    cut, parts = rows.side_by_side([short, long], 8)
    assert tokenizer.decode(cut[parts == 1]) == short and (cut == tokenizer.eos).sum() == 2 and (parts > 0).all()
    with pytest.raises(UserError, match="1 tokens cannot hold 2 texts"):
        rows.side_by_side([short, long], 1)


def test_a_given_model_without_glm_tokens(tmp_path):
    """sentencepiece's own defaults: unknown is 0, no padding piece; id 0 is padding after the end all the same."""
    words = vocabulary.load(sentencepiece_file(tmp_path / "given.model", byte_fallback=False))
    assert (words.eos, words.pad) == (2, 2)
    row = SharedRows(words).fixed("cat ₿ heart", 24)
    end = row.tolist().index(2)
    assert 0 in row[:end] and not row[end + 1:].any()
    again = pickle.loads(pickle.dumps(words))
    assert again.encode("a cat") == words.encode("a cat") and again.vocab_size == words.vocab_size
    no_end = sentencepiece_file(tmp_path / "endless.model", eos_id=-1)
    with pytest.raises(UserError, match="has no end token"):
        vocabulary.load(no_end)
    end_first = vocabulary.load(sentencepiece_file(tmp_path / "first.model", eos_id=0, unk_id=2))
    with pytest.raises(UserError, match="end token has id 0"):
        SharedRows(end_first)


# --- SigLIP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [12, 64])
def test_siglip_2_as_transformers_has_it(tmp_path, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(gemma_like(tmp_path))
    assert type(theirs).__name__ == "Siglip2Tokenizer"
    want = theirs(TEXTS, padding="max_length", max_length=length, truncation=True)["input_ids"]
    rows = pickle.loads(pickle.dumps(PaddedRows(vocabulary.load(tmp_path))))
    got = [rows.fixed(text, length).tolist() for text in TEXTS]
    assert got == want and got[3] == [1] + [0] * (length - 1) and got[-1][-1] == 1
    # Not NFKC: the full-width letters stay what they are, in lower case.
    assert got[4] != rows.fixed(unicodedata.normalize("NFKC", TEXTS[4]), length).tolist()

    tokens, segments = rows.side_by_side(TEXTS[:3], 3 * length)
    assert tokens.tolist() == sum(want[:3], []) and segments.tolist() == sum([[n] * length for n in (1, 2, 3)], [])
    with pytest.raises(UserError, match="does not divide into 3 texts"):
        rows.side_by_side(TEXTS[:3], 3 * length + 1)


def test_siglip_2_reads_special_tokens_in_a_text_as_text(tmp_path):
    """As sentencepiece does; `tokenizers` would find them."""
    pytest.importorskip("transformers")
    words = vocabulary.load(gemma_like(tmp_path))
    for text in ("<eos> hi", "<pad>", "a<bos>"):
        assert not {0, 1, 2} & set(words.encode(text)) and words.encode(text)


def test_the_first_siglip_as_transformers_has_it(tmp_path):
    """c4_en has a dummy space in front and NFKC of its own; punctuation goes, and padding is the end token."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    path = sentencepiece_file(tmp_path / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    theirs = transformers.SiglipTokenizer(str(path))
    texts = [text for text in TEXTS if text]  # an empty one breaks their class
    want = theirs(texts, padding="max_length", max_length=12, truncation=True)["input_ids"]
    rows = PaddedRows(vocabulary.load(tmp_path), first=True)
    assert [rows.fixed(text, 12).tolist() for text in texts] == want
    assert want[2][-1] == 1 and rows.fixed("cat!", 12).tolist() == rows.fixed("CAT", 12).tolist()


# --- files ------------------------------------------------------------------------------------------------------------


def test_vocabularies_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no vocabulary here .none of spiece.model"):
        vocabulary.load(tmp_path)
    with pytest.raises(UserError, match="'.*none.json' does not exist"):
        vocabulary.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="'.*none.model' does not exist"):
        vocabulary.load(tmp_path / "none.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read .*download it again"):
        vocabulary.load(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install 'glmv_jax.hf.'"):
        vocabulary.load(tmp_path)
