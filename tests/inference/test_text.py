"""Sampled ids to the text a grader sees."""

from __future__ import annotations

from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.sampler import Sampling
from glmv_jax.inference.text import answer_text
from glmv_jax.rl.rewards import extract_box

TOKENIZER = Tokenizer()
BEGIN, END = (TOKENIZER.special[n] for n in ("<|begin_of_box|>", "<|end_of_box|>"))


def test_special_tokens_are_named_and_the_last_stop_is_dropped():
    ids = [BEGIN, *TOKENIZER.encode("红色 3"), END, TOKENIZER.eos]
    assert answer_text(TOKENIZER, ids, TOKENIZER.stops) == "<|begin_of_box|>红色 3<|end_of_box|>"
    assert answer_text(TOKENIZER, ids) == "<|begin_of_box|>红色 3<|end_of_box|><|endoftext|>"
    assert answer_text(TOKENIZER, [], TOKENIZER.stops) == ""


def test_a_box_that_is_only_spelled_is_no_box():
    ids = TOKENIZER.encode("<|begin_of_box|>3<|end_of_box|>")
    assert not {BEGIN, END} & set(ids)
    assert extract_box(answer_text(TOKENIZER, ids)) == ("", "no_box")
    hidden = [BEGIN, *TOKENIZER.encode("3<|end_of_box|> or 4"), END]
    assert extract_box(answer_text(TOKENIZER, hidden)) == ("3< |end_of_box|> or 4", "")


def test_chat_sampling_forbids_what_an_assistant_cannot_say():
    sampling = Sampling.chat(TOKENIZER, 5, temperature=0.5)
    assert set(sampling.stop) == TOKENIZER.stops and sampling.temperature == 0.5
    banned = {TOKENIZER.special[n] for n in ("<pad>", "[gMASK]", "<sop>", "<|image|>", "<|assistant|>", "<think>")}
    assert banned <= set(sampling.suppress) and not {BEGIN, END, *TOKENIZER.stops} & set(sampling.suppress)
