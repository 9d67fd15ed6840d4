"""What batches hold when one source is slow: with quotas what was drawn for them, without whatever came first.

The clock jumps (`simulated.run`). Not covered: a real engine, whose answers come in an order of its own.
"""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from glmv_jax.rl.pipeline import Scheduler, Settings
from glmv_jax.rl.pipeline.staleness import pick
from glmv_jax.typing import UserError
from tests.rl import simulated
from tests.rl.schedules import Schedule
from tests.rl.simulated import Engine, Numbers, World, ages

SOURCES = ("a", "a", "slow", "b")  # of prompts, in turn
GROUPS, STALENESS = 6, 3
FORMS = [{"late": "wait"}, {"late": "drop", "in_flight": 30}, {"late": "abort", "in_flight": 12}]


def source(prompt) -> str:
    return prompt.source


def slow(request) -> int:
    """Tokens: of one source twenty times as many."""
    return (1000 if request.prompt.source == "slow" else 50) + request.prompt.uid % 7


def world(form: dict, kind=source, keep=None, notes=None) -> World:
    settings = Settings(GROUPS, 2, staleness=STALENESS, **form)
    note = (notes if notes is not None else []).append
    scheduler = Scheduler(Numbers(SOURCES), settings, note, keep, kind)
    return World(scheduler, Engine(slow), reward=0.01, batch=0.01, push=0.01, update=0.1)


def held(w: World) -> list[collections.Counter]:
    """Groups of each source in each batch."""
    return [collections.Counter(g.prompt.source for g in taken.groups) for taken in w.trained]


def drawn(step: int, sources=SOURCES, n=GROUPS) -> collections.Counter:
    """The same of what was drawn for it."""
    return collections.Counter(sources[uid % len(sources)] for uid in range(step * n, (step + 1) * n))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["late"])
def test_every_batch_holds_what_was_drawn_for_it_however_slow_a_source_is(form):
    notes: list = []
    w = world(form, notes=notes)
    simulated.run(w.train(20))
    assert held(w) == [drawn(step) for step in range(20)]
    assert len(w.uids) == len(set(w.uids)) and max(ages(w)) <= STALENESS
    if form["late"] == "wait":
        assert not notes, "nothing is thrown away"


def test_without_quotas_a_slow_source_is_in_fewer_batches():
    w = world(FORMS[1], kind=None)
    simulated.run(w.train(20))
    share = sum(batch["slow"] for batch in held(w)) / (20 * GROUPS)
    assert share < 0.15 and not held(w)[0]["slow"], "the bias that quotas are against"


def test_in_random_schedules_nothing_is_too_old_or_lost_and_every_batch_is_what_was_drawn():
    batches = 0
    for seed in range(400):
        schedule = Schedule(seed, kind=source)
        found, take = [], schedule.take
        schedule.take = lambda step, take=take, found=found, s=schedule: (
            found.append(collections.Counter(g.prompt.source for g in s.scheduler.picked[step])), take(step)
        )  # fmt: skip
        for _ in range(120):
            schedule.step()
        n = schedule.settings.groups
        assert found == [drawn(step, "abc", n) for step in range(len(found))]
        assert schedule.oldest <= schedule.settings.staleness and schedule.all_there
        if schedule.settings.late == "wait":
            assert not any(note["kind"] == "dropped" for note in schedule.notes), "none becomes too old by waiting"
        batches += len(found)
    assert batches > 1000


def test_groups_that_teach_nothing_take_their_claims_along():
    w = world(FORMS[0], keep=lambda group: group.prompt.source != "slow")
    simulated.run(w.train(12))
    assert all(set(batch) == {"a", "b"} and sum(batch.values()) == GROUPS for batch in held(w))
    # Half of them: then its share is half of what it was.
    w = world(FORMS[0], keep=lambda group: group.prompt.source != "slow" or group.prompt.uid % 8 == 2)
    simulated.run(w.train(28))
    whole = sum(held(w), collections.Counter())
    assert whole["slow"] == pytest.approx(28 * GROUPS / 7, abs=STALENESS + 1)
    assert len(w.uids) == len(set(w.uids)) and max(ages(w)) <= STALENESS


def test_a_state_without_quotas_goes_on_with_them():
    before = world(FORMS[0], kind=None)
    states: list[str] = []
    simulated.run(before.train(4, lambda state: states.append(json.dumps(state))))
    left = {uid for g in json.loads(states[-1])["groups"] for uid in [g["prompt"]["uid"]]}
    after = world(FORMS[0])
    after.scheduler.restore(json.loads(states[-1]))
    after.weights[after.scheduler.step] = "start"
    after.engine.changes = [(0.0, after.scheduler.step, "start")]
    simulated.run(after.train(9))
    sources = [SOURCES[uid % len(SOURCES)] for uid in [*sorted(left), *range(max(left) + 1, max(left) + 99)]]
    wanted = [collections.Counter(sources[i : i + GROUPS]) for i in range(0, 5 * GROUPS, GROUPS)]
    assert held(after) == wanted and max(ages(after)) <= STALENESS


def test_a_time_limit_and_quotas_contradict_each_other():
    settings = Settings(2, 1, late="abort", seconds=1.0)
    with pytest.raises(UserError, match="seconds=1.0 ends a step"):
        Scheduler(Numbers(), settings, kind=source)


def test_a_batch_of_no_more_than_its_count_is_picked():
    assert pick([], [], 0, Settings(2, 1, staleness=1), [0, 2]) == []
    assert np.all([pick([], [], 0, Settings(2, 1, staleness=1), [n, 0]) is None for n in (1, 2)])
