"""What stage 5 keeps of its rollouts, in both forms: rows that say what the metrics say, and pictures.

A policy that draws ids at random stands in for the model. Numbers are computed again by pandas from the file alone;
32 sources with everything that may befall an answer are in tests/rl/test_metrics.py.
"""

from __future__ import annotations

import itertools
import json
import types

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from glmv_jax.data.hashes import image_hash
from glmv_jax.data.naflex import patchify
from glmv_jax.rl import Grade, tasks
from glmv_jax.rl.pipeline.samples import Pictures
from glmv_jax.rl.prompts import namespaced
from tests.train.test_rl_integrity import FORMS, build

STEPS = 3


def by_letters(text, sample):
    """Rewards of all sizes, parts that some answers lack, a grader that fails."""
    if text.startswith("b"):
        return Grade(0.0, False, {}, ("timeout",))
    score = text.count("a") / max(1, len(text))
    return Grade(score, score > 0.2, {"format": 1.0, "score": score} | ({"style": 0.5} if "c" in text else {}))


@pytest.fixture(scope="module", params=FORMS)
def run(request, tmp_path_factory):
    """(stage, folder, metrics of each step) of a few steps with the trainer's own log-probabilities."""
    folder = tmp_path_factory.mktemp(request.param)
    stage = build(folder, request.param, "rollout.prompts=12", "rollout.group=3", "rollout.proximal=true",
                  "rollout.rows=(12,)", "rollout.samples.pictures=1000", "rollout.samples.groups=12")  # fmt: skip
    stage.verifiers = dict.fromkeys(stage.names, by_letters)
    near = lambda params, rows: jnp.asarray(rows["old_logprob"]) + 0.1 * (rows["old_logprob"] != 0)  # noqa: E731
    stage.others.logprobs = near
    data, metrics = stage.train_data(), []
    try:
        for step in range(STEPS):
            metrics.append(stage.next_batch(data, types.SimpleNamespace(params={}, step=step))[1])
        state = json.loads(json.dumps(data.get_state()))
        stage.next_batch(data, types.SimpleNamespace(params={}, step=STEPS))  # killed before it was saved
    finally:
        data.close()
    again = stage.train_data()
    again.set_state(state)
    try:
        metrics.append(stage.next_batch(again, types.SimpleNamespace(params={}, step=STEPS))[1])
    finally:
        again.close()
    return stage, folder, metrics


def test_the_metrics_are_those_of_the_rows(run):
    _, folder, told = run
    table = pd.read_json(folder / "samples.jsonl", lines=True)
    assert table["flags"].map(lambda flags: flags == ["timeout"]).any()
    for step, metrics in enumerate(told):
        samples = table[(table.kind == "sample") & (table.step == step)]
        assert len(samples) == 36, "a row for each answer, once, also after a restart"
        by = samples.groupby("source")
        found = {"reward": by.reward.mean(), "length": by.length.mean(), "truncated": by.truncated.mean()}
        found["timeout"] = samples["flags"].map(lambda f: "timeout" in f).groupby(samples.source).mean()
        for part in ("score", "style"):
            found[f"component/{part}"] = samples.components.map(lambda c, p=part: c.get(p)).dropna().astype(float)
            found[f"component/{part}"] = found[f"component/{part}"].groupby(samples.source).mean()
        groups = samples.groupby(["source", "uid"]).correct
        every = groups.apply(lambda c: np.mean([any(s) for s in itertools.combinations(c, 3)]))
        found["pass@3"] = every.groupby("source").mean()
        tokens = samples[["source", "trained_at", "versions", "logprobs", "trained_logprobs"]]
        tokens = tokens[tokens.trained_logprobs.notna()]
        tokens = tokens.explode(["versions", "logprobs", "trained_logprobs"])
        rho = np.exp((tokens.trained_logprobs - tokens.logprobs).astype(float))
        found["mismatch"] = (rho - np.log(rho) - 1.0).groupby(tokens.source).mean()
        age = samples[["source", "trained_at", "versions"]].explode("versions")
        found["staleness"] = (age.trained_at - age.versions).astype(float).groupby(age.source).mean()
        assert found["mismatch"].min() > 1e-3
        for name, values in found.items():
            assert {key: metrics[f"{name}/{key}"] for key in values.index} == pytest.approx(values.to_dict(), rel=1e-5)


def test_every_run_has_a_trace(run):
    """In the synchronous form one thing after the other: what is drawn, graded, laid in rows, trained on."""
    stage, folder, _ = run
    trace = json.loads((folder / "trace.json").read_text())
    at = lambda microseconds: round(microseconds, 2)  # noqa: E731  a sum of two differences
    spans = {name: sorted((at(e["ts"]), at(e["ts"] + e["dur"])) for e in trace["traceEvents"] if e.get("cat") == name)
             for name in ("rollout", "reward", "batch", "train")}  # fmt: skip
    assert spans["rollout"] and spans["reward"] and spans["batch"] and "overlap" in trace["otherData"]
    if not stage.asynchronous:
        # With the one that was killed; nobody asks for more after the last, and so its update is not in it.
        assert [len(x) for x in spans.values()] == [STEPS + 2, STEPS + 2, STEPS + 2, STEPS]
        ends = [edge for step in zip(spans["rollout"], spans["reward"], spans["batch"]) for edge in np.ravel(step)]
        assert ends == sorted(ends) and trace["otherData"]["overlap"] == 0.0
        for (begin, end), batch, following in zip(spans["train"], spans["batch"], spans["rollout"][1:]):
            assert batch[1] <= begin <= end <= following[0]


def test_rows_say_what_was_asked_and_answered(run):
    stage, folder, _ = run
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    asked = {row["uid"]: row for row in rows if row["kind"] == "prompt"}
    answers = [row for row in rows if row["kind"] == "sample"]
    assert len(asked) == (STEPS + 1) * 12 and {row["uid"] for row in answers} == set(asked)
    for row in answers:
        prompt = asked[row["uid"]]
        source = tasks.get(prompt["source"]).source("train", namespaced("rl", stage.data_seed))
        sample = source[int(prompt["id"].rpartition("/")[2])]
        assert (prompt["prompt"], prompt["gold"]) == (sample.prompt, sample.answer) and row["id"] == sample.id
        assert stage.tokenizer.decode(row["tokens"]).startswith(row["text"])
        assert len(row["tokens"]) == len(row["logprobs"]) == len(row["versions"]) == row["length"]
        assert set(row["versions"]) == {row["step"]} == {row["trained_at"]}
        grade = by_letters(row["text"], sample)
        assert (row["reward"], row["correct"], row["flags"]) == (grade.reward, grade.correct, list(grade.flags))


def test_rows_of_what_is_trained_on_have_the_trainers_log_probabilities(run):
    _, folder, told = run
    assert not any(metrics["left_out"] for metrics in told)
    answers = [row for row in map(json.loads, (folder / "samples.jsonl").open()) if row["kind"] == "sample"]
    rewards = {uid: {row["reward"] for row in answers if row["uid"] == uid} for uid in {row["uid"] for row in answers}}
    for row in answers:
        assert ("trained_logprobs" in row) == (len(rewards[row["uid"]]) > 1), "of groups that teach something"
        if "trained_logprobs" in row:
            assert row["trained_logprobs"] == pytest.approx(np.add(row["logprobs"], 0.1), abs=1e-6)
    assert len({"trained_logprobs" in row for row in answers}) == 2, "the test needs groups of both kinds"


def test_pictures_are_of_so_many_groups_of_each_source(tmp_path):
    stage = build(tmp_path, "sync", "rollout.prompts=12", "rollout.rows=(12,)", "rollout.samples.groups=1")
    data = stage.train_data()
    try:
        stage.next_batch(data, types.SimpleNamespace(params={}, step=0))
    finally:
        data.close()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    first = {row["source"]: row["images"] for row in reversed(rows) if row["kind"] == "sample"}
    there = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert there == {name for names in first.values() for name in names} and len(rows) == 12 + 24


def test_pictures_are_those_that_were_seen_each_once(run):
    stage, folder, _ = run
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    named = {name for row in rows if row["kind"] == "sample" for name in row["images"]}
    there = {path.stem: path for path in (folder / "pictures").glob("*")}
    assert named and named <= set(there)
    for name, path in there.items():
        assert path.suffix == ".png"
        assert image_hash(*patchify(np.asarray(Image.open(path)), stage.asker.patcher.patch)) == name


def test_so_many_pictures_are_kept_the_first_and_the_newest(tmp_path):
    images = [patchify(np.full((16, 16, 3), n, np.uint8), 8) for n in range(9)]
    pictures = Pictures(tmp_path / "made", 4, 8)
    for n in (0, 1, 0, 2, 3, 4):
        pictures.put(str(n), *images[n])
    names = lambda: sorted(path.name for path in (tmp_path / "made").iterdir())  # noqa: E731
    assert names() == ["0.png", "1.png", "3.png", "4.png"]
    again = Pictures(tmp_path / "made", 4, 8)  # of the next attempt
    again.put("5", *images[5])
    assert names() == ["0.png", "1.png", "4.png", "5.png"]
    assert (np.asarray(Image.open(tmp_path / "made" / "5.png")) == 5).all()


def test_nothing_is_kept_where_nothing_is_wanted(tmp_path):
    stage = build(tmp_path, "sync", "rollout.samples.rows=false")
    data = stage.train_data()
    try:
        stage.next_batch(data, types.SimpleNamespace(params={}, step=0))
        data.get_state()
    finally:
        data.close()
    assert {path.name for path in tmp_path.iterdir()} <= {"faults.jsonl"}
