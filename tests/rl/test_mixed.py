"""The mixed run's settings fit its tasks, and its benchmark counts right. Not covered: what it reaches (its result)."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import open_tokenizer
from glmv_jax.rl import tasks
from glmv_jax.train.sweep.child import progress_of

REPO = pathlib.Path(__file__).resolve().parent.parent.parent
EXPERIMENT = str(REPO / "experiments" / "rl_mixed.py")


@pytest.fixture(scope="module")
def mixed():
    spec = importlib.util.spec_from_file_location("rl_mixed_benchmark", REPO / "benchmarks" / "rl_mixed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_prompt_and_gold_answer_has_room():
    cfg = config.load(EXPERIMENT)
    assert len(cfg.data.weights) >= 30
    patcher = Patcher(patch=8, temporal=2, max_patches=cfg.data.image_patches)
    asker = DocumentBuilder(open_tokenizer(None), patcher, cfg.data.prompt_tokens, cfg.data.image_patches)
    r = cfg.rollout
    for kind in cfg.data.weights:
        source = tasks.source(kind, "heldout", 3)
        most = dict(r.limits).get(kind, r.max_new_tokens)
        for i in range(12):
            sample = source[i]
            asker.prompt(sample)  # raises for what is too long
            answer = len(asker.tokenizer.encode(sample.answer)) + 3  # box tokens, stop
            assert answer <= most, f"{sample.id}: {answer} tokens of {most}"


@pytest.mark.parametrize("kind", ["count", "track"])
def test_alone_asks_as_many_questions_as_joint(mixed, kind, monkeypatch):
    monkeypatch.chdir(REPO)
    joint, alone = config.load(EXPERIMENT), config.load(f"{EXPERIMENT}:task={kind}")
    asked = joint.steps * joint.rollout.prompts * joint.data.weights[kind] / sum(joint.data.weights.values())
    assert abs(alone.steps * alone.rollout.prompts - asked) <= alone.rollout.prompts / 2
    assert [name for name, weight in alone.data.weights.items() if weight] == [kind]
    assert mixed._alone_steps(kind, joint.steps, joint) == alone.steps


def test_gains_are_paired_and_judged(mixed):
    rose = mixed.paired({"a": 0.0, "b": 0.5, "gone": 1.0}, {"a": 0.5, "b": 1.0})
    assert rose == {"mean": 0.5, "error": 0.0}
    mixed_one = mixed.paired({"a": 0.0, "b": 0.0}, {"a": -1.0, "b": 0.8})
    assert mixed_one["mean"] == pytest.approx(-0.1) and mixed_one["error"] == pytest.approx(0.9)
    assert math.isnan(mixed.paired({"a": 0.0}, {"a": 1.0})["mean"])
    worse = {"mean": -0.2, "error": 0.01}
    said = mixed.verdict({"x": rose, "y": mixed_one, "z": worse})
    assert said["better"] == 1 and said["surely better"] == ["x"] and said["surely worse"] == ["z"]
    assert said["least"] == ("z", -0.2) and said["forgotten"] == ["y", "z"]
    assert said["interval"][0] < said["mean"] < said["interval"][1]


def test_interval_of_two_sources(mixed):
    """Of two values the resampled mean is the lower, the middle or the upper one: 1/4, 1/2, 1/4."""
    assert mixed.interval([0.0, 1.0]) == (0.0, 1.0)
    values = np.random.default_rng(0).normal(size=400)
    low, high = mixed.interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_oscillation(mixed):
    assert mixed.oscillation([0.1, 0.2, 0.3, 0.4])["falls"] == 0 and mixed.oscillation([0, 1, 2])["rough"] == 0
    assert mixed.oscillation([0.0, 0.4, 0.1, 0.5])["falls"] == pytest.approx(0.1)
    noise = np.random.default_rng(0).normal(size=20_000)
    assert mixed.oscillation(noise + np.arange(20_000))["rough"] == pytest.approx(1.0, rel=0.03)


def test_curve_takes_the_last_word_on_a_step(mixed, tmp_path):
    rows = [(1, 0.0), (2, 9.0), (2, 0.2), (3, 0.4), (4, 0.6)]  # step 2 was done again after a resume
    lines = [{"step": step, "kind": "train", "reward/x": value} for step, value in rows]
    lines += [{"step": 4, "kind": "eval", "reward/x": 7.0}, {"step": 5, "kind": "train", "reward/y": 7.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixed.BINS = 2
    assert mixed.curve(tmp_path, "x") == pytest.approx([0.1, 0.5])


def test_progress_is_read_from_lines_of_many_sources(tmp_path):
    lines = [{"step": step} | {f"reward/{source}": 1 / 3 for source in range(900)} for step in (6, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "cut')
    assert progress_of(tmp_path) == (7, None)


def test_plot_is_an_svg(mixed):
    row = {"start": 0.1, "joint": 0.4, "shuffled": None}
    curves = {"x": {"joint": [0.0, 0.5], "alone": [0.1, 0.2, 0.3]}}
    drawn = ET.fromstring(mixed.plot({"x": row, "y": row | {"shuffled": 0.2}}, curves))
    assert len(drawn.findall("{*}circle")) == 5 and len(drawn.findall("{*}polyline")) == 2
