"""Answers from a run's folder with a tiny random model, and what a user sees when something is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.packing import collate
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference import Model, generate, generate_from_run, last_stage, question
from glmv_jax.typing import UserError
from tests import tiny_vlm

TOKENIZER = Tokenizer()
CFG = tiny_vlm.config(vocab=TOKENIZER.vocab_size, patch=8)


@pytest.fixture(scope="module")
def model():
    return Model(CFG, tiny_vlm.params(CFG), TOKENIZER, Patcher(max_patches=16))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3)).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("chat", [True, False])
def test_the_answer_is_the_greedy_one(model, picture, chat):
    model = dataclasses.replace(model, chat=chat)
    asked = question(picture, "How many cats?")
    answer = generate(model, asked, max_new_tokens=2)
    builder = DocumentBuilder(TOKENIZER, model.patcher, 64, 16)
    document = builder.prompt(asked) if chat else builder.pretrain(asked)
    rows = collate([document], 64, 16, 192, ["question"])
    last = int(rows["length"][0]) - (1 if chat else 2)  # a pretraining text ends with its end token
    # Only the first token: what follows it is the sampler's own test. Special tokens would be suppressed.
    logits = tiny_vlm.batch_logits(CFG, model.params, rows)[0, last]
    logits = np.where(np.arange(len(logits)) < 26, -np.inf, logits)
    assert answer.startswith(TOKENIZER.decode([int(logits.argmax())]).strip()) and answer
    text_only = generate(model, question(None, "How many cats?"), max_new_tokens=2)
    assert text_only != answer


def test_a_seed_repeats_and_another_differs(model, picture):
    asked = question(picture, "说说这张图")
    draw = lambda seed: generate(model, asked, max_new_tokens=4, temperature=1.0, seed=seed)  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_the_last_finished_stage_answers(model, tmp_path, picture):
    for stage in ("mim", "pretrain", "sft", "sft_more"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "results.json").write_text("{}")
    (tmp_path / "rl").mkdir()  # begun, not finished
    assert last_stage(tmp_path).name == "sft"
    (tmp_path / "rl" / "results.json").write_text("{}")
    seen = []
    load = lambda folder: seen.append(folder) or model  # noqa: E731
    assert generate_from_run(tmp_path, load, picture, "What?", max_new_tokens=2) == generate(
        model, question(picture, "What?"), max_new_tokens=2
    )
    assert seen == [tmp_path / "rl"]


def one_line(match, function):
    with pytest.raises(UserError, match=match) as caught:
        function()
    assert "\n" not in str(caught.value)


def test_runs_that_cannot_answer(tmp_path):
    one_line("run .*nowhere' does not exist", lambda: last_stage(tmp_path / "nowhere"))
    one_line("no stage of pretrain, sft, rl has begun", lambda: last_stage(tmp_path))
    (tmp_path / "pretrain").mkdir()
    one_line("stage pretrain is not finished; resume it", lambda: last_stage(tmp_path))
    for stage, said in (("siglip", "is of stage siglip, which answers no questions"), ("sft", "is not finished")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.json").write_text(f'{{"stage": "{stage}"}}')
        one_line(said, lambda: last_stage(tmp_path / stage))  # noqa: B023
    (tmp_path / "sft" / "results.json").write_text("{}")
    assert last_stage(tmp_path / "sft") == tmp_path / "sft", "the work directory of a stage answers for itself"


def test_wrong_input_is_met_before_anything_is_loaded(model, tmp_path, picture):
    def never(folder):
        raise AssertionError("loaded")

    ask = lambda image, prompt: generate_from_run(tmp_path, never, image, prompt)  # noqa: E731
    (tmp_path / "notes.png").write_text("not a picture")
    one_line("the prompt is empty", lambda: ask(None, " \n"))
    one_line("does not exist; check the path", lambda: ask(tmp_path / "dog.png", "What?"))
    one_line("is not a picture", lambda: ask(tmp_path / "notes.png", "What?"))
    wide = Image.new("RGB", (8000, 20), "red")
    one_line("times as long", lambda: generate(model, question(wide, "What?")))
    one_line("is longer than", lambda: generate(model, question(None, "word " * 20_000)))
    one_line("asks for no answer", lambda: generate(model, question(None, "What?"), max_new_tokens=0))
    one_line("temperature=nan", lambda: generate(model, question(None, "What?"), temperature=float("nan")))


def test_one_pixel_is_a_picture(model):
    assert isinstance(generate(model, question(Image.new("RGB", (1, 1)), "What?"), max_new_tokens=2), str)
