"""Numbers by data source against pandas, from nothing but the dumped samples; and what a restart makes of the dump."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pandas as pd
import pytest

from glmv_jax.rl.metrics import EVENTS, mismatch_kl, summary
from glmv_jax.rl.pipeline import SampleLog, Scheduler, Settings, sample_rows
from glmv_jax.rl.rewards import Grade
from tests.rl import simulated
from tests.rl.simulated import Engine, Numbers, World

SOURCES = tuple(f"task{i:02}" for i in range(32))


def life(path, settings: Settings) -> list[dict]:
    """A run of 32 sources, 12 groups at a time, all of it dumped."""
    log, notes = SampleLog(path), []
    scheduler = Scheduler(Numbers(SOURCES), settings, notes.append)

    def fate(request) -> str:
        if random.Random(f"{request.prompt.uid}/{request.id}").random() < 0.05:
            return "failed"
        return "length" if length(request) == 80 else ""

    length = lambda r: min(80, int(random.Random(f"{r.prompt.uid}/{r.member}").lognormvariate(3.5, 0.8)) + 1)  # noqa: E731
    world = World(scheduler, Engine(length, fate=fate), reward=0.001, update=0.02)

    async def grade(request, completion):
        """Rewards that are not 0 or 1, parts that some answers lack, graders that fail."""
        rng = random.Random(f"{request.prompt.uid}/{request.member}/grade")
        if rng.random() < 0.1:
            return Grade(0.0, False, {}, (rng.choice(("timeout", "error", "nan")),))
        score, form = rng.random(), float(rng.random() < 0.8)
        parts = {"format": form, "score": score} | ({"style": rng.random()} if rng.random() < 0.5 else {})
        return Grade(form * score, score > 0.5, parts)

    world.grade = grade
    simulated.run(world.train(40))
    rows = [row for taken in world.trained for row in sample_rows(taken.groups)]
    for row in rows:  # the trainer's own log-probabilities, near the engine's
        rng = np.random.default_rng(row["uid"] * 100 + row["member"])
        row["logprobs"] = (-np.exp(rng.normal(size=row["length"]))).tolist()
        row["trained_logprobs"] = (np.array(row["logprobs"]) + rng.normal(0, 0.1, row["length"])).tolist()
    log.write([*rows, *notes])
    log.close()
    return [*rows, *notes]


def recomputed(path) -> dict[str, float]:
    """The same by pandas, from the file."""
    table = pd.read_json(path, lines=True)
    samples = table[table.kind == "sample"].copy()
    found = {}

    def put(metric: str, by) -> None:
        found.update({f"{metric}/{source}": value for source, value in by.items()})

    put("reward", samples.groupby("source").reward.mean())
    put("accuracy", samples.groupby("source").correct.mean())
    put("length", samples.groupby("source").length.mean())
    put("truncated", samples.groupby("source").truncated.mean())
    for flag in ("timeout", "error"):
        wanted = {"timeout"} if flag == "timeout" else {"timeout", "error", "nan"}
        put(flag, samples["flags"].map(lambda flags, w=wanted: bool(w & set(flags))).groupby(samples.source).mean())
    parts = pd.json_normalize(samples.components.tolist()).set_index(samples.index)
    put("format", parts["format"].fillna(0.0).groupby(samples.source).mean())
    for part in ("score", "style"):
        put(f"component/{part}", parts[part].groupby(samples.source).mean())
    groups = samples.groupby(["source", "uid"])
    put("same", (groups.reward.max() == groups.reward.min()).groupby("source").mean())
    for k in (1, 2, 4):
        # Every subset of k of a group's answers, one by one.
        subsets = groups.reward.apply(lambda r, k=k: np.mean([max(s) >= 0.7 for s in itertools.combinations(r, k)]))
        put(f"pass@{k}", subsets.groupby("source").mean())
    tokens = samples[["source", "trained_at", "versions", "logprobs", "trained_logprobs"]]
    tokens = tokens.explode(["versions", "logprobs", "trained_logprobs"])
    put("logprob", tokens.logprobs.astype(float).groupby(tokens.source).mean())
    rho = np.exp((tokens.trained_logprobs - tokens.logprobs).astype(float))
    put("mismatch", (rho - np.log(rho) - 1.0).groupby(tokens.source).mean())
    age = (tokens.trained_at - tokens.versions).astype(float)
    put("staleness", age.groupby(tokens.source).mean())
    put("staleness_max", age.groupby(tokens.source).max())
    counts = table[table.kind != "sample"].groupby(["kind", "source"]).size()
    for kind, source in itertools.product(EVENTS, sorted(set(table.source))):
        found[f"{kind}/{source}"] = float(counts.get((kind, source), 0.0))
    for metric, values in pd.Series(found).groupby(lambda name: name.rpartition("/")[0]):
        found[f"{metric}/mean"] = values.mean()
    return found


def test_numbers_by_source_are_what_pandas_finds_in_the_dumped_samples(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = life(path, Settings(8, 4, staleness=2, late="abort", in_flight=12))
    wanted, got = recomputed(path), summary(rows, passes=(1, 2, 8), threshold=0.7)
    assert {name.rpartition("/")[2] for name in got} == {*SOURCES, "mean"}
    for metric in ("timeout", "failed", "aborted", "truncated", "staleness", "mismatch", "same"):
        assert got[f"{metric}/mean"] > 0, f"the run has no {metric}, so nothing is compared"
    assert sorted(got) == sorted(wanted)
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_mismatch_is_zero_for_equal_policies_and_never_below():
    rng = np.random.default_rng(0)
    p, q = (np.log(rng.dirichlet(np.ones(5))) for _ in range(2))
    drawn = rng.choice(5, size=200_000, p=np.exp(p))
    estimate = mismatch_kl(p[drawn], q[drawn])
    assert (mismatch_kl(p, p) == 0).all() and (estimate >= 0).all()
    assert estimate.mean() == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=0.02)


def test_tokens_nobody_drew_have_no_age():
    row = {"uid": 0, "source": "s/with/slashes", "reward": 1.0, "correct": True, "components": {}, "flags": (),
           "length": 3, "truncated": False, "logprobs": [-1.0, 0.0, -2.0], "versions": [3, -1, 4],
           "trained_at": 5}  # fmt: skip
    found = summary([row])
    assert found["staleness/s/with/slashes"] == 1.5 and found["staleness_max/mean"] == 2.0
    assert "aborted/mean" not in found and "mismatch/mean" not in found and not math.isnan(sum(found.values()))


def test_a_restart_cuts_the_dump_back_to_what_was_saved(tmp_path):
    path = tmp_path / "samples.jsonl"
    log = SampleLog(path)
    log.write([{"n": 0}, {"n": 1}])
    state = json.loads(json.dumps(log.get_state()))
    log.write([{"n": 2}])
    log.close()  # killed: the state of after the third row was never saved
    with open(path, "a") as file:
        file.write('{"n": to')
    again = SampleLog(path, state)
    again.write([{"n": "two, once"}])
    again.close()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1, "two, once"]
    with pytest.raises(ValueError, match="not the file of this run"):
        SampleLog(tmp_path / "other.jsonl", state)
    SampleLog(path).close()
    assert path.read_text() == ""


def test_grades_survive_a_saved_state():
    scheduler = Scheduler(Numbers(), Settings(1, 1))
    (request,) = scheduler.begin()[:1]
    drawn = Engine(lambda r: 3)._draw(request, 0.0, 3)
    scheduler.ended(request.id, simulated.Completion(drawn, "length", {"text": "<x>"}))
    grade = Grade(0.25, False, {"score": 0.25}, ("no_box",))
    scheduler.graded(request.id, grade)
    other = Scheduler(Numbers(), Settings(1, 1))
    other.restore(json.loads(json.dumps(scheduler.state())))
    other.begin()
    ((_, (group,)),) = [other.pick()]
    member = group.members[0]
    assert member.grade == grade and dataclasses.asdict(group.prompt) == dataclasses.asdict(request.prompt)
    np.testing.assert_array_equal(member.answer.drawn.tokens, drawn.tokens)
    assert member.answer.reason == "length" and member.answer.facts == {"text": "<x>"}
