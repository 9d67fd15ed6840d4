"""A tokenizer.json behind our interface, against the library and transformers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from glmv_jax.data.tokenizer import Tokenizer, open_tokenizer  # noqa: E402
from glmv_jax.data.tokenizer_json import JsonTokenizer  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.data import json_vocabulary  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    json_vocabulary.write(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return JsonTokenizer(folder / "tokenizer.json")


TEXTS = ["the cat sat", "数一数有几个爱心？ 12", " leading\n\n  and inner", "😀 ñ é", "", "<not special>", "a|b<c"]


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_is_as_the_library_has_it(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == json_vocabulary.build().encode(text).ids and tokenizer.decode(ids) == text


def test_no_text_yields_a_special_id(tokenizer):
    rng = np.random.default_rng(0)
    special = set(tokenizer.special.values())
    assert len(special) == len(json_vocabulary.NAMES)
    texts = ["".join(rng.choice([*json_vocabulary.NAMES, "<", "|", ">", " ", "猫", "<|"], 6)) for _ in range(300)]
    for text in [*json_vocabulary.NAMES, *texts]:
        ids = tokenizer.encode(text)
        assert not special & set(ids), text
        assert tokenizer.decode(ids) == text


def test_specials_that_are_allowed(tokenizer):
    text = "<|user|>hi<think>3</think><|image|>"
    assert tokenizer.encode_with_specials(text, json_vocabulary.NAMES) == json_vocabulary.build().encode(text).ids
    some = tokenizer.encode_with_specials(text, ("<think>",))
    assert [i for i in some if i in tokenizer.special.values()] == [tokenizer.special["<think>"]]
    assert tokenizer.decode(some, keep_special=True) == text
    assert tokenizer.decode(tokenizer.encode_with_specials(text, json_vocabulary.NAMES)) == "hi3"
    with pytest.raises(UserError, match="has no token '<|imge|>'"):
        tokenizer.encode_with_specials("x", ("<|imge|>",))


def test_attributes_and_pickling(tokenizer, folder):
    names = tokenizer.special
    assert tokenizer.image == names["<|image|>"] and tokenizer.eos == tokenizer.pad == names["<|endoftext|>"]
    assert tokenizer.stops == {names["<|endoftext|>"], names["<|user|>"], names["<|observation|>"]}
    assert tokenizer.vocab_size == json_vocabulary.build().get_vocab_size() > max(names.values())
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("数 cats") == tokenizer.encode("数 cats") and copy.special == tokenizer.special
    assert isinstance(open_tokenizer(folder / "tokenizer.json"), JsonTokenizer)
    assert isinstance(open_tokenizer(None), Tokenizer)
    assert tokenizer.decode([*tokenizer.encode("cat"), 10_000]) == "cat", "rows that no token has"


def test_wrong_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        JsonTokenizer(tmp_path / "tokenizer.json")
    for text in ("{", "[]", '{"model": {"type": "none"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read") as error:
            JsonTokenizer(tmp_path / "tokenizer.json")
        assert "\n" not in str(error.value)
