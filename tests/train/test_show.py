"""`glmv show-batch`, from an experiment to what is printed."""

from __future__ import annotations

import numpy as np
import pytest

from glmv_jax import cli, config
from glmv_jax.train import main, show
from glmv_jax.typing import UserError
from tests.data.test_showing import Page

SFT = "experiments/vlm_sft.py:size=nano"


def test_it_is_the_batch_of_that_step(capsys, tmp_path):
    page = tmp_path / "batch.html"
    args = ["--config", SFT, "--config.batch=2"]
    assert cli.main(["show-batch", *args, "--step", "2", "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"sft, step 2, 4 documents: {page}\n"
    stage = main.stage_class("sft")(config.override(config.load(SFT), ["batch=2"]))
    data = stage.train_data()
    batch = [next(data), next(data)][1]
    data.close()
    shown = Page(page.read_text())
    tokens = batch["tokens"][batch["segments"] > 0]
    assert "".join(shown.texts) == stage.tokenizer.decode(tokens, keep_special=True).replace("<|image|>", "")
    assert sum(image.size // 3 for image in shown.images) == (batch["frame"] > 0).sum() * stage.model.vision.patch**2
    assert cli.main(["show-batch", *args]) == 0
    assert "row 1: " in (printed := capsys.readouterr().out) and "<|begin_of_box|>" in printed


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["show-batch", "--help"])
    assert capsys.readouterr().out.count("  glmv show-batch --config") >= 2


def test_wrong_input_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--step 0: steps count from 1"):
        show.show_batch(config.load(SFT), 0)
    with pytest.raises(UserError, match="stage siglip has none"):
        show.show_batch(config.load("experiments/cogvit_siglip.py:size=nano"))
    with pytest.raises(UserError, match="cannot be written .No such file"):
        show.show_batch(config.load(SFT), 1, str(tmp_path / "none" / "x.html"))


def test_rl_shows_its_prompts(tmp_path):
    page = tmp_path / "x.html"
    show.show_batch(config.load("experiments/rl_grpo.py:size=nano"), 1, str(page))
    shown = Page(page.read_text())
    assert all(text.endswith("<|assistant|></think>") for text in shown.texts) and len(shown.images) == len(shown.texts)
    assert np.all([image.ndim == 3 for image in shown.images])
