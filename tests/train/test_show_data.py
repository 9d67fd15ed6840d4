"""`glmv show-data`, from an experiment to what is printed: all five stages at nano size, and a person's own files."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from glmv_jax import cli, config
from glmv_jax.data import showing
from glmv_jax.train import main, show_data
from glmv_jax.typing import UserError
from tests.data.test_showing import Page

SFT, PRETRAIN, RL, MIM, SIGLIP = (
    f"experiments/{name}.py:size=nano"
    for name in ("vlm_sft", "vlm_pretrain", "rl_grpo", "cogvit_mim", "cogvit_siglip")
)
QUIET = Console(quiet=True)


def look(experiment: str, *overrides: str, draws: int = 12, each: int = 1):
    cfg = config.override(config.load(experiment), list(overrides))
    return {tally.name: tally for tally in show_data.show_data(cfg, draws, each, console=QUIET)}


@pytest.fixture
def mine(tmp_path):
    """Ten pictures with their texts, one that is none, and one without a text."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for n in range(10):
        pixels = np.random.default_rng(n).integers(0, 256, (40 + n, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"thing {n}")
    (folder / "broken.png").write_bytes(b"\x89PNG and no more")
    (folder / "broken.txt").write_text("broken")
    Image.new("RGB", (32, 32)).save(folder / "alone.png")
    return folder


@pytest.mark.parametrize("experiment", [SFT, PRETRAIN])
def test_examples_are_what_training_packs(experiment):
    """Its first documents are in the rows of the first step, to the letter and the pixel."""
    told = look(experiment, "batch=8", draws=8)
    stage = main.stage_class(config.load(experiment).stage)(config.override(config.load(experiment), ["batch=8"]))
    with contextlib.closing(stage.train_data()) as data:
        packed = [d for _ in range(2) for d in showing.read(next(data), stage.tokenizer, stage.names, 8)]
    text = lambda shown: (shown.source, "".join(run.text for run in shown.runs))  # noqa: E731
    pixels = {text(d): [frame for picture in d.pictures for frame in picture.frames] for d in packed}
    met = [tally.examples[0].shown for tally in told.values() if tally.turns]
    assert len(met) > 5 and {text(shown) for shown in met} <= set(pixels)
    for shown in met:
        for frame, packed_frame in zip(shown.pictures[0].frames, pixels[text(shown)]) if shown.pictures else ():
            np.testing.assert_array_equal(frame, packed_frame)
    assert sum(tally.turns for tally in told.values()) == 8


def test_questions_of_stage_5_come_with_their_answers():
    told = look(RL)
    cfg = config.load(RL)
    assert set(told) == set(cfg.data.weights)
    for tally in told.values():
        text = "".join(run.text for run in tally.examples[0].shown.runs)
        assert text.endswith("<|assistant|></think>") and tally.examples[0].answer


def test_environments_are_named_beside_the_questions_and_alone_are_an_error(capsys):
    played = ["rollout.environments=(('windows', 1.0),)", "data.tokens=1024", "data.patches=512",
              "rollout.episodes.turns=2"]  # fmt: skip
    cfg = config.override(config.load(RL), played)
    show_data.show_data(cfg, 2, 0, console=Console(width=200))
    assert "not shown: windows, which are played, not read" in capsys.readouterr().out
    nothing = [f"data.weights.{name}=0" for name in cfg.data.weights]
    with pytest.raises(UserError, match="asks no questions"):
        look(RL, *played, *nothing)


def test_stage_1_shows_crops_and_what_is_masked_of_them_without_a_teacher():
    told = look(MIM, draws=10)
    assert {name: tally.turns for name, tally in told.items()} == {"natural": 8, "instruction": 1, "scientific": 1}
    crop, masked = told["natural"].examples[0].shown.pictures[0].frames
    hidden = [(masked[y : y + 8, x : x + 8] == 128).all() for y in range(0, 48, 8) for x in range(0, 48, 8)]
    changed = [(masked != crop)[y : y + 8, x : x + 8].any() for y in range(0, 48, 8) for x in range(0, 48, 8)]
    assert sum(hidden) == sum(changed) == told["natural"].sizes["masked patches"][0] == 13


def test_stage_2_shows_pairs():
    told = look(SIGLIP, draws=40)
    assert {name: tally.turns for name, tally in told.items()} == {"emoji": 30, "basics": 10}
    runs = told["basics"].examples[0].shown.runs
    assert len(runs) == 3 and runs[0].picture == 0 and all(run.text.strip() for run in runs[1:])


def test_own_files_in_a_folder(mine, capsys, tmp_path):
    page = tmp_path / "data.html"
    args = ["show-data", "--config", f"{SFT},sources=mine", f"--config.data.sources.mine.path={mine}",
            "--config.data.sources.mine.prompt=What is it?", "--config.data.heldout=0",
            "--config.data.sources.mine.weight=8", "--draws", "30", "--html", str(page)]  # fmt: skip
    assert cli.main(args) == 0
    assert capsys.readouterr().out == f"sft: the first 30 draws of 9 sources: {page}\n"
    shown = Page(page.read_text())
    assert sum(text.count("What is it?<|assistant|></think>thing ") for text in shown.texts) == 2
    assert "mine: 1 broken, no text belongs to it" in page.read_text() and "(broken.png" in page.read_text()
    told = look(f"{SFT},sources=mine", f"data.sources.mine.path={mine}", "data.heldout=0", draws=24)["mine"]
    assert told.records == 12 and set(told.stored) <= {(60, 40 + n) for n in range(10)}


def test_a_source_that_gives_nothing_is_exit_code_1(capsys, tmp_path):
    lines = tmp_path / "bad.jsonl"
    lines.write_text("{broken\n" * 5)
    args = ["show-data", "--config", f"{PRETRAIN},sources=bad", f"--config.data.sources.bad.path={lines}",
            "--draws", "400", "--examples", "0"]  # fmt: skip
    assert cli.main([*args, "--config.data.sources.bad.weight=300"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "bad: 20 broken, its json is broken" in printed and "training would end" in printed


def test_pairs_on_disk(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for n in range(30):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (50, 50, 3), np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"照片 {n}" if n % 2 else f"photo {n}")
    told = look(f"{SIGLIP},sources=a", f"data.sources.a.path={folder}", "data.heldout=0.2", draws=20, each=2)["a"]
    assert told.records == 30 and told.drawn == 20 and told.wanted == 1.0 and set(told.stored) == {(50, 50)}
    assert len({example.id for example in told.examples}) == 2


def test_nothing_is_written_beside_the_run(mine, tmp_path, monkeypatch):
    cfg = config.override(config.load(f"{SFT},sources=mine"), [f"data.sources.mine.path={mine}"])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    show_data.show_data(cfg, 24, 0, console=QUIET)
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_input_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--draws 0"):
        show_data.show_data(config.load(SFT), 0)
    with pytest.raises(UserError, match="cannot be written .No such file"):
        show_data.show_data(config.load(SFT), 1, 0, str(tmp_path / "none" / "x.html"))
    with pytest.raises(UserError, match="no such"):
        look(f"{SFT},sources=mine", f"data.sources.mine.path={tmp_path / 'none'}", "data.sources.mine.reader=folder")
