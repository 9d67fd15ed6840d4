"""The shipped vocabulary: no text yields a special id, and texts survive."""

from __future__ import annotations

import io
import pickle
import unicodedata

import numpy as np
import pytest
import sentencepiece

from glmv_jax.data.tokenizer import BOX, SPECIALS, Tokenizer
from glmv_jax.typing import UserError

TEXTS = ["hello world", "数一数有几个爱心？", "[[12,345,678,999]]", "a\nb  c", " leading", "😀 ñ é ½", "ＡＢＣ１２", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_special_ids_are_fixed_and_first(tokenizer):
    assert [tokenizer.special[name] for name in SPECIALS] == list(range(len(SPECIALS)))
    assert tokenizer.vocab_size == 4096
    assert (tokenizer.pad, tokenizer.eos, tokenizer.image) == (0, 1, 9)
    assert tokenizer.stops == {1, 5, 7}


def test_no_text_yields_a_special_id(tokenizer):
    rng = np.random.default_rng(0)
    special = set(tokenizer.special.values())
    texts = [*SPECIALS, "".join(SPECIALS), *("".join(rng.choice([*SPECIALS, "<", "|", ">", " ", "\0", "▁"], 6))
                                             for _ in range(300))]
    texts += ["".join(map(chr, rng.integers(1, 0xD7FF, 12))) for _ in range(300)]
    for text in texts:
        assert not special & set(tokenizer.encode(text)), text
        assert not special & set(tokenizer.encode_with_specials(text, ())), text


@pytest.mark.parametrize("text", TEXTS + ["<|image|> is text", *SPECIALS])
def test_round_trip_is_nfkc(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFKC", text)


def test_only_allowed_specials_count(tokenizer):
    text = "<|image|><|begin_of_box|>3<|end_of_box|>"
    ids = tokenizer.encode_with_specials(text)
    assert ids[-3:] == [tokenizer.special[BOX[0]], *tokenizer.encode("3"), tokenizer.special[BOX[1]]]
    assert ids[:-3] == tokenizer.encode("<|image|>")
    assert tokenizer.decode(ids, keep_special=True) == text
    assert tokenizer.decode(ids) == "<|image|>3"
    with pytest.raises(UserError, match="no special token"):
        tokenizer.encode_with_specials("x", ("<|imge|>",))


def test_decode_keeps_order_and_takes_arrays(tokenizer):
    ids = [tokenizer.special["<|user|>"], *tokenizer.encode("猫"), tokenizer.eos, tokenizer.pad]
    assert tokenizer.decode(np.array(ids), keep_special=True) == "<|user|>猫<|endoftext|><pad>"
    assert tokenizer.decode(ids) == "猫"


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("数一数 cats") == tokenizer.encode("数一数 cats") and copy.special == tokenizer.special


def test_bad_vocabularies_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "text.model")
    for name, options in {"none": {}, "user": {"user_defined_symbols": list(SPECIALS[2:])}}.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e"] * 10), model_writer=model, vocab_size=300 + 30 * bool(options),
            byte_fallback=True, hard_vocab_limit=False, pad_id=0, pad_piece="<pad>", eos_id=1,
            eos_piece="<|endoftext|>", bos_id=-1, unk_id=2, minloglevel=2, **options)
        (tmp_path / f"{name}.model").write_bytes(model.getvalue())
        # A user-defined symbol would be found in text, so it does not count as special.
        with pytest.raises(UserError, match=r"lacks the control token \[gMASK\]"):
            Tokenizer(tmp_path / f"{name}.model")
