"""Prompts that accept lengths are measured on."""

from __future__ import annotations

import numpy as np
import pytest

from glmv_jax.data import heldout, texts
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.eval import drafts
from glmv_jax.inference.settings import Counts


@pytest.fixture(scope="module")
def builder():
    return DocumentBuilder(Tokenizer(), Patcher(patch=8, temporal=1, max_patches=48), 112, 128)


@pytest.fixture(scope="module")
def samples():
    read = texts.Texts("heldout", 1)
    asked = heldout.heldout_questions(["count", "name"], 2)
    return [read[i] for i in range(3)], [sample for kind in asked.values() for sample in kind]


def test_a_prompt_ends_before_what_it_leaves_to_be_said(builder, samples):
    document = builder.pretrain(samples[1][0])
    first = int(np.argmax(document.loss_weight > 0))
    short = drafts.cut(document, 2)
    np.testing.assert_array_equal(short.tokens, document.tokens[: first + 2])
    assert len(drafts.cut(document, 1000).tokens) == len(document.tokens) - 1
    assert (short.image_of_token >= 0).sum() == (document.image_of_token >= 0).sum() > 0


@pytest.mark.parametrize("form", ["pretrain", "chat"])
def test_prompts_are_of_both_kinds(builder, samples, form):
    found = drafts.continued(*samples, builder, form)
    assert len(found["text"]) == 3 and len(found["image"]) == 4
    assert all(x.pictures for x in found["image"]) and not any(x.pictures for x in found["text"])
    if form == "chat":
        np.testing.assert_array_equal(found["image"][0].tokens, builder.prompt(samples[1][0]).tokens)


def test_accept_lengths_are_by_kind():
    some = Counts(reached=np.array([4, 2]), accepted=np.array([2, 1]))
    none = Counts(reached=np.array([4, 0]), accepted=np.array([0, 0]))
    assert drafts.accept_lengths({"text": some, "image": none}) == {"text": 1 + 0.5 + 0.25, "image": 1.0}
