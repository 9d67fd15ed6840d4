"""Samples to documents, in both forms."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.records import Sample
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError

BUILDER = DocumentBuilder(Tokenizer(), Patcher(policy="smart"), max_tokens=64, max_patches=128)
PICTURE = Image.new("RGB", (32, 64), "red")
QUESTION = Sample("count/train/1", "count", (PICTURE,), "How many?", "3")


def spelled(document, learnt: bool = False) -> str:
    tokens = document.tokens[document.loss_weight > 0] if learnt else document.tokens
    return BUILDER.tokenizer.decode(tokens, keep_special=True)


def test_chat_form():
    document = BUILDER.chat(QUESTION)
    pads = "<|image|>" * 8
    assert spelled(document) == (
        f"[gMASK]<sop><|user|><|begin_of_image|>{pads}<|end_of_image|>How many?<|assistant|></think>"
        "<|begin_of_box|>3<|end_of_box|><|endoftext|>")
    assert spelled(document, learnt=True) == "<|begin_of_box|>3<|end_of_box|><|endoftext|>"
    assert document.patches == 32 and document.images[0][0].shape == (32, 192)
    assert (document.source, document.id) == ("count", "count/train/1")
    unboxed = BUILDER.chat(dataclasses.replace(QUESTION, boxed=False))
    assert spelled(unboxed, learnt=True) == "3<|endoftext|>"


def test_prompt_form_is_the_start_of_the_chat_form():
    prompt, whole = BUILDER.prompt(QUESTION), BUILDER.chat(QUESTION)
    assert whole.tokens.tolist()[: len(prompt.tokens)] == prompt.tokens.tolist()
    assert spelled(prompt).endswith("<|assistant|></think>") and not prompt.loss_weight.any()


def test_pretrain_form():
    document = BUILDER.pretrain(QUESTION)
    assert spelled(document).endswith("<|end_of_image|>How many?\n3<|endoftext|>")
    assert spelled(document, learnt=True) == "3<|endoftext|>"
    whole = dataclasses.replace(BUILDER, prompt_weight=0.5).pretrain(QUESTION)
    assert spelled(whole, learnt=True) == "How many?\n3<|endoftext|>" and set(whole.loss_weight) == {0, 0.5, 1}
    text = BUILDER.pretrain(Sample("t/1", "text", (), "", "The cat = 猫", boxed=False))
    assert spelled(text) == "[gMASK]<sop>The cat = 猫<|endoftext|>"
    assert spelled(text, learnt=True) == "The cat = 猫<|endoftext|>"


def test_further_turns_are_learnt_and_not_asked():
    several = dataclasses.replace(QUESTION, more=(("And stars?", "1"), ("Circles?", "2")))
    document = BUILDER.chat(several)
    assert spelled(document).endswith(
        "3<|end_of_box|><|user|>And stars?<|assistant|></think><|begin_of_box|>1<|end_of_box|>"
        "<|user|>Circles?<|assistant|></think><|begin_of_box|>2<|end_of_box|><|endoftext|>")
    boxed = "<|begin_of_box|>{}<|end_of_box|>"
    learnt = f"{boxed.format(3)}<|user|>{boxed.format(1)}<|user|>{boxed.format(2)}<|endoftext|>"
    assert spelled(document, learnt=True) == learnt
    assert spelled(BUILDER.prompt(several)) == spelled(BUILDER.prompt(QUESTION))
    plain = BUILDER.pretrain(several)
    assert spelled(plain).endswith("How many?\n3\nAnd stars?\n1\nCircles?\n2<|endoftext|>")
    assert spelled(plain, learnt=True) == "3\n1\n2<|endoftext|>"


def test_what_weighs_the_same_in_the_loss():
    long = dataclasses.replace(QUESTION, answer="1234567")
    for per, power in (("token", 1.0), ("sqrt", 0.5), ("document", 0.0)):
        builder = dataclasses.replace(BUILDER, per=per)
        for sample, learnt in ((QUESTION, 4), (long, 10)):  # the digits, two box tokens and the end
            document = builder.chat(sample)
            assert document.targets == learnt
            assert document.loss_weight.sum() == pytest.approx(learnt**power)
    with pytest.raises(UserError, match="token, sqrt, document"):
        dataclasses.replace(BUILDER, per="sample")


def test_several_images_keep_their_order():
    document = BUILDER.chat(dataclasses.replace(QUESTION, images=(PICTURE, PICTURE.rotate(90, expand=True))))
    assert [yx.max(0).tolist() for _, yx in document.images] == [[7, 3], [3, 7]]
    numbers = [i for i in document.image_of_token.tolist() if i >= 0]
    assert numbers == [0] * 8 + [1] * 8


def test_several_images_share_the_budget_of_a_row():
    long = dataclasses.replace(BUILDER, max_tokens=999)
    for count, each in ((1, 32), (4, 32), (5, 20), (10, 8), (32, 4)):
        document = long.chat(dataclasses.replace(QUESTION, images=(PICTURE,) * count))
        sizes = {len(patches) for patches, _ in document.images}
        assert len(sizes) == 1 and max(sizes) <= each and document.patches <= long.max_patches
        assert max(sizes) == 32 or count > 4


def test_too_long_is_a_user_error_with_the_numbers():
    with pytest.raises(UserError, match="tokens do not fit a row of 64"):
        BUILDER.chat(dataclasses.replace(QUESTION, answer="3" * 60))
    with pytest.raises(UserError, match="1280 patches do not fit a row of 128"):
        dataclasses.replace(BUILDER, max_tokens=999).chat(dataclasses.replace(QUESTION, images=(PICTURE,) * 40))
    with pytest.raises(UserError, match="prompt is empty"):
        BUILDER.chat(dataclasses.replace(QUESTION, prompt=""))
