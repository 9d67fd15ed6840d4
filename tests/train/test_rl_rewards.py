"""Stage 5 with cfg.rewards: the reward system grades, in both forms, and ends with the data.

Not covered: what the system makes of answers (tests/rl/rewards), and the update (that of the stage without it).
"""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.inference.sampler import Sampler, Sampling
from glmv_jax.train import main
from glmv_jax.typing import UserError
from tests.rl.rewards import hostile
from tests.rl.rewards.fake_judge import running

SMALL = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.prompts=6", "rollout.group=4",
         "rollout.max_new_tokens=6", "data.ahead=0", "rollout.staleness=0"]  # fmt: skip
RULE = {"kind": "rule", "rule": "tests.rl.rewards.hostile:parity"}
ASYNC = "rollout.pipeline=async"


def build(rewards: dict, *more: str):
    cfg = config.load("experiments/rl_grpo.py:size=nano")
    cfg.rewards = rewards
    return main.stage_class("rl")(config.override(cfg, [*SMALL, *more]))


@pytest.fixture(scope="module")
def drawn():
    """(sampler, parameters): the stages of this file draw the same answers, by a program that is compiled once."""
    made = build({})
    sampling = Sampling.chat(made.tokenizer, 6, temperature=1.0, top_p=1.0)
    assert made.sampler.sampling == sampling
    return Sampler(made.model, sampling, 4), made.init_params(jax.random.key(0))


def steps(made, drawn, count: int = 2):
    """(batch, metrics) of the first steps, and the worker processes that there were."""
    made.sampler, params = drawn
    data = made.train_data()
    try:
        found = [made.next_batch(data, types.SimpleNamespace(params=params, step=step)) for step in range(count)]
        threads = [made.grading.system._thread] if made.grading.system else []
    finally:
        data.close()
    assert made.grading.system is None and not any(thread.is_alive() for thread in threads)
    return found


def sources(rule: dict) -> dict:
    parts = {name: {"parts": {"rule": rule}} for name in build({}).names}
    return {"sources": parts, "workers": 1, "limit": 60.0}


def equal(got, wanted):
    assert sorted(got) == sorted(wanted)
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("form", [(), (ASYNC,)], ids=["sync", "async"])
def test_workers_grade_as_functions_of_this_process_do(form, drawn):
    """The same rule makes the same batches, to the bit, and every answer is counted."""
    plain, system = build({}, *form), build(sources(RULE), *form)
    plain.verifiers = dict.fromkeys(plain.names, hostile.parity)
    assert not system.verifiers
    for (wanted, metrics), (got, more) in zip(steps(plain, drawn), steps(system, drawn), strict=True):
        equal(got, wanted)
        assert (wanted["advantage"] != 0).any()
        assert {name: more[name] for name in metrics} == pytest.approx(metrics, nan_ok=True)
        added = {name: more[name] for name in more.keys() - metrics.keys()}
        assert all(name.startswith("grading/") for name in added)
        assert sum(x for name, x in added.items() if "/graded/" in name) == 24
        assert sum(x for name, x in added.items() if "/error/" in name) == 0


def test_tasks_that_the_table_does_not_name_are_graded_as_they_say(drawn):
    """By their own verifiers, in the workers: an untrained policy writes no box."""
    made = build({"workers": 1})
    ((_, metrics),) = steps(made, drawn, 1)
    graded = {name: metrics[f"grading/graded/{name}"] for name in made.names}
    asked = {name: metrics[f"reward/{name}"] for name in made.names if f"reward/{name}" in metrics}
    assert sum(graded.values()) == 24 and {name for name, n in graded.items() if n} == set(asked)
    assert set(asked.values()) == {0.0} and metrics["error/mean"] == 0.0


def test_graders_that_hang_or_raise_and_a_judge_end_no_step(drawn, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    table = sources(RULE)
    table["sources"]["count"]["parts"]["rule"] = {"kind": "rule", "rule": "tests.rl.rewards.hostile:loops",
                                                  "limit": 0.1}  # fmt: skip
    table["sources"]["point"]["parts"]["rule"] = {"kind": "rule", "rule": "tests.rl.rewards.hostile:untellable"}
    table["sources"]["name"]["parts"] = {"judge": {"kind": "judge", "judge": "main", "box": False, "images": False}}
    with running(lambda body, n: 0.0 if n else "yes") as judge:
        table["judges"] = {"main": {"url": judge.url, "model": "m"}}
        ((_, metrics),) = steps(build(table), drawn, 1)
    flags = {name: [metrics[f"grading/{what}/{name}"] for what in ("graded", "timeout", "error")]
             for name in ("count", "point", "name")}  # fmt: skip
    (counted, hung, _), (pointed, _, raised), (named, *failed) = flags.values()
    assert counted == hung > 0 and pointed == raised > 0 and named > 0 == sum(failed)
    assert metrics["timeout/count"] == metrics["error/point"] == metrics["reward/name"] == 1.0
    assert metrics["grading/requests/judge main"] == named + 1, "the first asks whether it is there"


def test_answers_of_a_group_are_compared_in_both_forms(drawn):
    """Of G answers that can be compared each earns 1 and a point for every other that is worse, half for a tie: in the
    mean 1 + (G - 1) / 2, whatever they are."""
    group = {"comparator": {"kind": "rule", "rule": "tests.rl.rewards.hostile:longer"}}
    table = {"sources": {name: {"parts": {}, "group": group} for name in build({}).names}, "workers": 1}
    ((sync, metrics),) = steps(build(table), drawn, 1)
    ((beside, others),) = steps(build(table, ASYNC), drawn, 1)
    equal(beside, sync)
    for found in (metrics, others):
        earned = {name: x for name, x in found.items() if name.startswith("reward/")}
        assert set(earned.values()) == {2.5} and found["same/mean"] < 1.0
        assert sum(x for name, x in found.items() if name.startswith("grading/grouped/")) == 24
    assert (sync["advantage"] != 0).any()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sources": {"cuont": {"parts": {"rule": RULE}}}}, "rewards.sources.cuont: .* nearest: count"),
        ({"worker": 2}, "rewards: no key 'worker'; nearest: workers"),
        ({"sources": {"count": {"parts": {"x": {"kind": "judge", "judge": "main"}}}}}, "no judge 'main'"),
    ],
)
def test_tables_that_make_no_sense_are_refused_before_anything_starts(table, message):
    with pytest.raises(UserError, match=message):
        build(table)


def test_the_table_survives_the_records_of_a_run():
    cfg = build(sources(RULE)).cfg
    again = config.unflat(config.flat(cfg))
    assert again.rewards == cfg.rewards and main.stage_class("rl")(again).grading._table is not None
