"""Evaluation sets: deterministic, complete, and nothing of them in training."""

from __future__ import annotations

import numpy as np

from glmv_jax.data import emoji, heldout
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.text_rows import SharedRows
from glmv_jax.data.tokenizer import Tokenizer

TOKENIZER, PATCHER = Tokenizer(), Patcher()
ROWS = SharedRows(TOKENIZER)
BUILDER = DocumentBuilder(TOKENIZER, PATCHER, 160, 256)
KINDS = ["count", "spatial"]


def test_pairs_are_the_held_out_concepts_with_their_texts():
    pairs = heldout.heldout_pairs(ROWS, PATCHER)
    assert len(set(pairs.concept)) == len(pairs.ids) == 180
    assert pairs.vision["patches"].shape == (180, 64, 192)
    for row, name in enumerate(pairs.names["zh"]):
        np.testing.assert_array_equal(pairs.texts["zh name"][row], ROWS.fixed(name, 16))
    assert set(pairs.texts) == {"en name", "zh name", "en name+keywords", "zh name+keywords"}
    assert pairs.ids == [emoji.load()[i].id for i in emoji.split("heldout")]
    few = heldout.heldout_pairs(ROWS, PATCHER, limit=5)
    np.testing.assert_array_equal(few.vision["patches"], pairs.vision["patches"][:5])


def test_questions_are_the_same_on_every_call():
    one, two = heldout.heldout_questions(KINDS, 5), heldout.heldout_questions(KINDS, 5)
    assert {kind: [s.id for s in samples] for kind, samples in one.items()} == {
        kind: [f"{kind}/heldout/{i}" for i in range(5)] for kind in KINDS}
    for kind in KINDS:
        assert [s.prompt + s.answer for s in one[kind]] == [s.prompt + s.answer for s in two[kind]]


def test_packed_batches_hold_every_sample_once():
    samples = sum(heldout.heldout_questions(KINDS, 15).values(), [])
    batches = heldout.packed_batches(samples, BUILDER, "chat", 2, KINDS)
    assert sum(int(b["segments"].max(1).sum()) for b in batches) == 30
    assert all(b["tokens"].shape == (2, 160) for b in batches)


def test_prompt_chunks_are_all_of_one_shape():
    samples = heldout.heldout_questions(["count"], 7)["count"]
    chunks = list(heldout.prompt_chunks(samples, BUILDER, 3, KINDS))
    assert [len(chunk) for _, chunk in chunks] == [3, 3, 1]
    assert sum((chunk for _, chunk in chunks), []) == samples
    assert {batch["tokens"].shape for batch, _ in chunks} == {(3, 160)}
