"""Held-out accuracy and its controls, on real questions; the model, where one is needed, is tiny and random."""

from __future__ import annotations

import collections
import functools
import json

import numpy as np
import pytest
from PIL import Image

from glmv_jax import rl
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.heldout import heldout_questions
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.records import Sample
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.eval import vlm
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.sampler import Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.rl.task import box
from tests import tiny_vlm

SCORE = functools.partial(rl.score, verifiers=rl.verifiers())
KINDS = ("count", "point", "read")


@pytest.fixture(scope="module")
def samples():
    return [s for group in heldout_questions(KINDS, 12).values() for s in group]


def test_accuracy_counts_right_answers_by_task(samples):
    gold = [box(s.answer) for s in samples]
    assert vlm.accuracy(samples, gold, SCORE) == {"accuracy/mean": 1.0} | {f"accuracy/{k}": 1.0 for k in KINDS}
    some = [text if i % 3 and s.source != "read" else "" for i, (s, text) in enumerate(zip(samples, gold))]
    shares = vlm.accuracy(samples, some, SCORE, "x")
    assert shares["x/count"] == shares["x/point"] == pytest.approx(2 / 3) and shares["x/read"] == 0.0
    assert shares["x/mean"] == pytest.approx(4 / 9)


def test_the_best_constant_answer_is_one_a_task_and_language():
    def sample(source, lang, answer):
        return Sample("", source, (), "?", answer, meta={"check": "exact", "lang": lang})

    golds = {("name", "en"): "cat cat dog", ("name", "zh"): "猫 狗 狗 狗", ("attribute", "en"): "red blue"}
    samples = [sample(*group, gold) for group, said in golds.items() for gold in said.split()]
    guessed = vlm.best_constant(samples, SCORE)
    assert guessed == {"accuracy/name": 5 / 7, "accuracy/attribute": 1 / 2, "accuracy/mean": pytest.approx(17 / 28)}


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_moves_every_image_within_its_task_and_size(samples, seed):
    owner = {id(s.images[0]): s for s in samples}
    groups = collections.Counter((s.source, s.images[0].size) for s in samples)
    shuffled = vlm.with_shuffled_images(samples, seed)
    assert len(shuffled) == sum(n for n in groups.values() if n > 1)
    assert len({id(s.images[0]) for s in shuffled}) == len(shuffled), "no image twice"
    by_id = {s.id: s for s in samples}
    for s in shuffled:
        own, given = by_id[s.id], owner[id(s.images[0])]
        assert given.id != s.id and given.source == s.source and given.images[0].size == own.images[0].size
        assert (s.prompt, s.answer, s.meta) == (own.prompt, own.answer, own.meta)


def test_a_model_is_asked_under_four_conditions_with_the_same_programs(samples):
    tokenizer = Tokenizer()
    cfg = tiny_vlm.config(vocab=tokenizer.vocab_size, patch=8)
    builder = DocumentBuilder(tokenizer, Patcher(max_patches=16), max_tokens=40, max_patches=16)
    settings = Settings(slots=16, length=43, chunks=(40,), lanes=1, patches=(16,))
    engine, params = Engine(cfg, None, Sampling.chat(tokenizer, 3), settings), tiny_vlm.params(cfg)
    metrics = vlm.evaluate(engine, params, samples, builder, SCORE, controls=True, drawn=True)
    conditions = ("accuracy", "accuracy_sampled", "accuracy_shuffled", "accuracy_blind")
    assert sorted(metrics) == sorted(f"{c}/{k}" for c in conditions for k in (*KINDS, "mean"))
    traces = engine.traces
    ask = lambda asked, **more: vlm.answers(engine, params, asked, builder, temperature=0.0, **more)  # noqa: E731
    own, blind = ask(samples), ask(vlm.with_grey_images(samples))
    assert len(own) == len(samples) and own != blind
    order = np.random.default_rng(0).permutation(len(samples))
    assert ask([samples[i] for i in order]) == [own[i] for i in order], "an answer is its question's alone"
    drawn = ask(samples, seed=1) == own, vlm.answers(engine, params, samples, builder, seed=1) != own
    assert drawn == (True, True) and engine.traces == traces


def test_written_samples_can_be_shown(samples, tmp_path):
    texts = [box(s.answer) for s in samples]
    texts[0] = box("9\ud800")  # half of a character, as a cut answer may end
    vlm.write_samples(tmp_path / "samples", samples, texts, SCORE)
    lines = [json.loads(line) for line in (tmp_path / "samples" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == [s.id for s in samples] and not lines[0]["correct"]
    for line, s in zip(lines[1:], samples[1:]):
        assert line["correct"] and line["reward"] == 1.0 and line["answer"] == line["gold"] == s.answer
        assert Image.open(tmp_path / "samples" / line["image"]).size == s.images[0].size
    point = next(line for line in lines if line["source"] == "point")
    assert [m["role"] for m in point["boxes"]] == ["gold", "model"] and "point" in point["boxes"][0]
