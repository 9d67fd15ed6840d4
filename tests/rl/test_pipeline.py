"""The asynchronous pipeline on simulated durations: overlap, aborts, staleness, failures, and what is kept of it all.

The clock jumps (`simulated.run`), so seconds here are the workload's and none pass. Not covered: a real engine and
threads (see test_pipeline_local), processes (benchmarks/rl_ray.py).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading

import numpy as np
import pytest

from glmv_jax.rl.pipeline import Scheduler, Settings, Together, Trace, sample_rows
from glmv_jax.rl.rewards import Grade
from glmv_jax.typing import UserError
from tests.rl import simulated
from tests.rl.schedules import Schedule, synchronous
from tests.rl.simulated import Engine, Numbers, World, ages


def world(settings: Settings, length, notes=None, engine=None, keep=None, **seconds) -> World:
    scheduler = Scheduler(Numbers(), settings, (notes if notes is not None else []).append, keep)
    return World(scheduler, Engine(length, **(engine or {})), **seconds)


def heavy_tail(seed: int, typical=50, longest=2000):
    """Lengths that depend on the answer alone: most near `typical`, one in 25 as long as can be."""

    def length(request) -> int:
        rng = random.Random(f"{seed}/{request.prompt.uid}/{request.member}")
        return longest if rng.random() < 0.04 else int(typical * rng.uniform(0.5, 1.5))

    return length


# --- callbacks and overlap (requirement 3) ----------------------------------------------------------------------------


def test_every_answer_is_graded_as_soon_as_it_is_there():
    w = world(Settings(32, 1, staleness=0), lambda r: 2000 if r.member == r.prompt.uid == 0 else 50, reward=0.1)
    simulated.run(w.train(1))
    early = [at for at, _ in w.graded if at <= 0.5]
    assert len(early) == 31 and max(early) == pytest.approx(0.15)
    assert [at for at, _ in w.graded if at > 0.5] == [pytest.approx(2.1)]


def test_stages_overlap_and_a_step_takes_as_long_as_the_longest():
    # 8 groups of 4 answers of 0.5 s on 16 slots: 1 s of rollouts a step, beside 0.3 + 0.3 + 0.2 + 0.8 s of the others.
    seconds = dict(reward=0.3, batch=0.3, push=0.2, update=0.8)
    w = world(Settings(8, 4, staleness=3), lambda r: 500, engine={"slots": 16}, **seconds)
    pipeline = simulated.run(w.train(40))
    each = np.diff(w.times)[5:].mean()
    assert each <= 1.15 * 1.0, each
    assert pipeline.trace.overlap() >= 0.6
    assert pipeline.trace.overlap(("rollout", "reward", "batch", "weights")) >= 0.6, "among themselves, too"
    assert max(ages(w)) <= 3 and w.uids == sorted(w.uids)
    # The same parts one after the other.
    one = world(Settings(8, 4, staleness=0), lambda r: 500, engine={"slots": 16}, **seconds)
    alone = simulated.run(one.train(5))
    assert np.diff(one.times).mean() == pytest.approx(1.0 + 0.3 + 0.3 + 0.2 + 0.8, rel=0.01)
    assert alone.trace.overlap() < 0.2


@pytest.mark.parametrize("late", ["wait", "drop", "abort"])
def test_a_heavy_tail_costs_less_than_step_by_step(late):
    """The same engine of 32 slots and trainer, the same number of updates on batches of the same size."""

    def seconds(**changes) -> float:
        w = world(Settings(8, 4, **changes), heavy_tail(4, longest=600), engine={"slots": 32}, reward=0.02, update=0.1)
        simulated.run(w.train(25))
        assert all(len(taken.groups) == 8 for taken in w.trained) and w.engine.most <= 32
        return w.times[-1]

    assert seconds(staleness=4, late=late, in_flight=12) <= 0.6 * seconds(staleness=0)


def test_the_trace_is_one_that_perfetto_reads(tmp_path):
    w = world(
        Settings(2, 2, staleness=2), lambda r: 30 + 20 * r.member, reward=0.01, batch=0.02, push=0.01, update=0.02
    )
    pipeline = simulated.run(w.train(6))
    pipeline.trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"rollout", "reward", "batch", "weights", "train"}
    rows: dict = {}
    for e in (e for e in events if e["ph"] == "X"):
        assert e["ts"] >= 0 and e["dur"] >= 0 and isinstance(e["tid"], int)
        rows.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for spans in rows.values():  # what shares a row must not overlap
        spans.sort()
        assert all(a[1] <= b[0] + 1e-3 for a, b in zip(spans, spans[1:]))
    assert sum(e["cat"] == "train" for e in events if e["ph"] == "X") == 6


def test_a_trace_may_be_read_while_it_is_written():
    trace, going = Trace(keep=500), True

    def write() -> None:
        while going:
            trace.add("reward", "", 0.0)

    writer, interval = threading.Thread(target=write), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the threads take turns often enough to get in each other's way
    writer.start()
    try:
        sizes = [len(trace.to_json()["traceEvents"]) for _ in range(20)]
    finally:
        going = False
        writer.join()
        sys.setswitchinterval(interval)
    assert max(sizes) <= 505 and len(trace.spans) <= 500


def test_overlap_is_the_time_two_stages_work():
    trace = Trace(clock=lambda: 0.0)
    trace.add("rollout", "", 0.0, 4.0)
    trace.add("rollout", "", 1.0, 3.0)
    trace.add("reward", "", 3.0, 5.0)
    trace.add("train", "", 9.0, 10.0)
    assert trace.overlap() == pytest.approx(1.0 / 6.0) and trace.overlap(("rollout", "reward")) == pytest.approx(0.2)
    assert trace.seconds() == {"rollout": 4.0, "reward": 2.0, "batch": 0.0, "weights": 0.0, "train": 1.0}
    trace.add("reference", "runs/start", 0.0, 20.0)  # which lies there, and does no work
    assert trace.overlap() == pytest.approx(1.0 / 6.0) and trace.seconds()["reference"] == 20.0
    with pytest.raises(ValueError, match="not one of rollout"):
        trace.add("rolout", "", 0.0, 1.0)


# --- aborts and the cache (requirement 4) -----------------------------------------------------------------------------


def test_count_stops_at_n_of_m_and_the_rest_goes_on_first_with_what_it_had():
    notes: list = []
    length = lambda r: 100 + 10 * r.prompt.uid  # noqa: E731
    w = world(Settings(3, 2, staleness=1, late="abort", in_flight=5), length, notes, push=0.001, update=0.05)
    simulated.run(w.train(2))
    assert [g.prompt.uid for g in w.trained[0].groups] == [0, 1, 2]
    aborted = [n for n in notes if n["kind"] == "aborted" and n["step"] == 1]
    assert {n["uid"] for n in aborted} == {3, 4} and all(n["tokens"] == 120 for n in aborted)
    second = w.engine.submitted[10:20]  # 5 groups of 2 in the first step
    assert [r.prompt.uid for r in second] == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    for r in second[:4]:
        assert len(r.prefix) == 120 and set(r.prefix.versions) == {0}
    drawn = next(g for g in w.trained[1].groups if g.prompt.uid == 4).members[0].answer.drawn
    assert len(drawn) == 140 and list(drawn.versions) == [0] * 140  # it had 20 to go, and the update took 50
    np.testing.assert_array_equal(drawn.tokens[:120], second[2].prefix.tokens)


def test_what_is_complete_beyond_a_batch_counts_in_the_next_step():
    notes: list = []
    w = world(Settings(4, 1, staleness=2, late="abort", in_flight=7), lambda r: 10, notes)
    simulated.run(w.train(20))
    assert not any(n["kind"] == "dropped" for n in notes) and sorted(w.uids) == list(range(80))
    assert len(w.engine.submitted) <= 80 + 3 * 7, "no more is asked than there is room for"


def test_an_answer_that_spans_an_update_says_which_version_drew_each_token():
    w = world(Settings(1, 1, staleness=2, late="drop", in_flight=3), lambda r: 40 + 40 * r.prompt.uid, update=0.02)
    simulated.run(w.train(2))
    assert list(w.trained[1].groups[0].members[0].answer.drawn.versions) == [0] * 60 + [1] * 20


def test_what_is_too_old_to_go_on_from_begins_anew_and_is_counted():
    notes: list = []
    length = lambda r: 100 + 10 * r.prompt.uid  # noqa: E731
    w = world(Settings(3, 2, staleness=0, late="abort", in_flight=5), length, notes, update=0.05)
    simulated.run(w.train(2))
    assert sorted(n["uid"] for n in notes if n["kind"] == "dropped" and n["step"] == 1) == [3, 3, 4, 4]
    assert all(r.prefix is None and r.attempt == 1 for r in w.engine.submitted[10:14])
    assert set(ages(w)) == {0}


def test_time_ends_a_step_and_what_is_complete_is_the_batch():
    w = world(Settings(8, 1, staleness=1, late="abort", seconds=0.3), lambda r: 2000 if r.prompt.uid == 5 else 100)
    simulated.run(w.train(1))
    assert len(w.trained[0].groups) == 7 and w.times[0] <= 0.3 + 0.1
    # When nothing is complete by then, the first that is.
    w = world(Settings(8, 1, staleness=1, late="abort", seconds=0.3), lambda r: 1000 + r.prompt.uid)
    simulated.run(w.train(1))
    assert len(w.trained[0].groups) == 1 and w.times[0] == pytest.approx(1.0)


@pytest.mark.parametrize("changes", [
    {"late": "abort", "in_flight": 12}, {"late": "abort", "seconds": 0.12}, {"late": "wait"},
    {"late": "drop", "in_flight": 12},
])  # fmt: skip
def test_every_prompt_is_trained_on_once_or_still_there(changes):
    notes: list = []
    w = world(Settings(8, 4, **{"staleness": 2, **changes}), heavy_tail(1), notes, reward=0.01, update=0.03)
    simulated.run(w.train(50))
    s = w.scheduler
    left = {*s.open, *s.ready, *(g.prompt.uid for g in s.cache), *(g.prompt.uid for b in s.picked.values() for g in b)}
    assert len(set(w.uids)) == len(w.uids) and not left & set(w.uids)
    assert left | set(w.uids) == set(range(s.prompts.drawn)), "none is lost"
    assert max(ages(w)) <= 2
    assert not any(n["kind"] in ("given_up", "failed") for n in notes)
    if changes["late"] == "wait":
        assert not notes, "nothing is thrown away or stopped"


def test_a_time_limit_shortens_the_slowest_steps():
    """A long answer waits for no one: with a limit it goes on over several steps, from where it was."""

    def steps(**changes) -> tuple[float, World]:
        w = world(Settings(8, 2, staleness=16, **changes), heavy_tail(2, longest=1000), update=0.02)
        simulated.run(w.train(200))
        return float(np.quantile(np.diff([0.0, *w.times]), 0.99)), w

    slow, _ = steps(late="abort")
    quick, w = steps(late="abort", seconds=0.15, in_flight=24)
    assert quick <= 0.6 * slow, (quick, slow)
    longest = max((m for t in w.trained for g in t.groups for m in g.members), key=lambda m: m.aborts)
    assert longest.aborts >= 3 and len(longest.answer.drawn) == 1000 and len(set(longest.answer.drawn.versions)) > 3


# --- staleness (requirement 5) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", ["wait", "drop", "abort"])
def test_without_staleness_it_is_the_synchronous_run(late):
    length = heavy_tail(3, typical=12, longest=60)
    w = world(Settings(4, 3, staleness=0, late=late), length, reward=0.01, batch=0.02, push=0.005, update=0.03)
    simulated.run(w.train(12))
    weights, batches = synchronous(12, 4, 3, length)
    assert [[g.prompt.uid for g in t.groups] for t in w.trained] == [[uid for uid, _ in b] for b in batches]
    assert w.weights[12] == weights, "every token and reward is the same"
    other = world(Settings(4, 3, staleness=1), length, reward=0.01, update=0.03)
    simulated.run(other.train(12))
    assert other.weights[12] != weights, "the comparison can fail"


def test_no_trained_token_is_too_old_in_10_000_random_schedules():
    batches = aborted = dropped = 0
    for seed in range(10_000):
        world = Schedule(seed)
        for _ in range(45):
            world.step()
        assert world.oldest <= world.settings.staleness, f"seed {seed}"
        assert world.all_there, f"seed {seed}"
        kinds = [note["kind"] for note in world.notes]
        if world.settings.late == "wait":
            assert "dropped" not in kinds, f"seed {seed}"
        batches += world.trained_batches
        aborted += kinds.count("aborted")
        dropped += kinds.count("dropped")
    assert batches > 5_000 and aborted > 500 and dropped > 1_000, (batches, aborted, dropped)


@pytest.mark.parametrize("late", ["wait", "drop"])
def test_what_is_late_is_waited_for_or_drawn_again(late):
    """One answer takes as long as ten steps of the others."""
    notes: list = []
    length = lambda r: 1000 if r.prompt.uid == 0 and r.attempt == 0 else 100  # noqa: E731
    w = world(Settings(2, 1, staleness=2, late=late), length, notes, update=0.05)
    simulated.run(w.train(10))
    at = {uid: t.step for t in w.trained for uid in (g.prompt.uid for g in t.groups)}
    if late == "wait":
        assert at[0] == 2 and w.times[2] >= 1.0 and w.times[1] < 0.5 and not notes
    else:
        assert w.times[2] < 0.5 and [n["uid"] for n in notes if n["kind"] == "dropped"] == [0] and at[0] > 2
    assert max(ages(w)) <= 2


# --- failures (requirement 11, without processes) ---------------------------------------------------------------------


def fated(share: float):
    """Failed or lost answers, by the attempt."""

    def fate(request) -> str:
        rng = random.Random(f"{request.prompt.uid}/{request.member}/{request.attempt}")
        return rng.choice(("failed", "lost")) if rng.random() < share else ""

    return fate


@pytest.mark.parametrize("late", ["wait", "drop", "abort"])
def test_answers_that_fail_or_never_come_are_asked_again(late):
    notes: list = []
    settings = Settings(4, 4, staleness=1, late=late, in_flight=8 if late == "wait" else 6, patience=0.5, attempts=6)
    w = world(settings, lambda r: 50, notes, engine={"fate": fated(0.1)}, update=0.02)
    simulated.run(w.train(40))
    failed = [n for n in notes if n["kind"] == "failed"]
    assert len(w.trained) == 40 and all(len(g.members) == 4 and g.complete for t in w.trained for g in t.groups)
    assert {n["error"] for n in failed} == {"crash", "no sign of it"} and {n["source"] for n in failed} == {
        "a",
        "b",
        "c",
    }
    asked = len(w.engine.submitted)
    assert 0.05 < len(failed) / asked < 0.15
    assert sum(m.failures for t in w.trained for g in t.groups for m in g.members) > 0.7 * len(failed)


def test_a_prompt_whose_answers_always_fail_is_given_up_and_another_takes_its_place():
    notes: list = []
    w = world(Settings(2, 2, staleness=0, late="abort"), lambda r: 10, notes,
              engine={"fate": lambda r: "failed" if r.prompt.uid == 1 and r.member == 0 else ""})  # fmt: skip
    simulated.run(w.train(3))
    assert w.uids == [0, 2, 3, 4, 5, 6] and [n["uid"] for n in notes if n["kind"] == "given_up"] == [1]
    broken = world(Settings(2, 2), lambda r: 10, engine={"fate": lambda r: "failed"})
    with pytest.raises(UserError, match="50 prompts in a row failed, the last with 'crash'"):
        simulated.run(broken.train(1))


def test_a_grader_that_raises_fails_its_answer_and_a_builder_that_raises_ends_the_run():
    notes: list = []
    w = world(Settings(2, 2, staleness=0), lambda r: 10, notes)
    good = w.grade

    async def grade(request, completion):
        if request.prompt.uid == 1 and request.attempt == 0:
            raise ZeroDivisionError("no")
        return await good(request, completion)

    w.grade = grade
    simulated.run(w.train(2))
    assert {n["error"] for n in notes} == {"reward: ZeroDivisionError: no"} and w.uids == [0, 1, 2, 3]

    async def build(step, groups):
        raise MemoryError("rows")

    w = world(Settings(2, 2), lambda r: 10)
    w.build = build
    with pytest.raises(MemoryError, match="rows"):
        simulated.run(w.train(1))


def test_groups_that_teach_nothing_are_filtered_and_replaced():
    notes: list = []
    differ = lambda group: np.ptp(group.rewards) > 0  # noqa: E731
    for late in ("wait", "abort"):
        w = world(Settings(4, 2, staleness=1, late=late), lambda r: 5, notes, keep=differ, update=0.01)
        simulated.run(w.train(10))
        filtered = {n["uid"] for n in notes if n["kind"] == "filtered"}
        assert all(differ(g) for t in w.trained for g in t.groups) and not filtered & set(w.uids)
        assert 0.3 < len(filtered) / (len(filtered) + len(w.uids)) < 0.7, "two coins are equal half of the time"
        notes.clear()


def test_a_run_of_groups_that_teach_nothing_ends_with_a_reason():
    w = world(Settings(4, 2, staleness=1), lambda r: 5, keep=lambda group: False)
    with pytest.raises(
        UserError, match="1000 groups in a row taught nothing .the last of 'a', rewards .* train on all"
    ):
        simulated.run(w.train(1))


def test_a_groups_answers_are_compared_once_all_are_there():
    w = world(Settings(2, 3, staleness=0), lambda r: 10 + 10 * r.member)

    async def compare(answers):
        lengths = [len(completion.drawn) for _, completion in answers]
        return [Grade(float(sum(a > b for b in lengths)), False, {}) for a in lengths]

    w.grade = Together(compare, 3)
    simulated.run(w.train(2))
    assert all(list(g.rewards) == [0.0, 1.0, 2.0] for t in w.trained for g in t.groups)

    async def broken(answers):
        raise RuntimeError("no renderer")

    notes: list = []
    w = world(Settings(1, 2, staleness=0, attempts=2), lambda r: 10, notes)
    w.grade = Together(broken, 2)
    with pytest.raises(UserError, match="no renderer"):
        simulated.run(w.train(1))


# --- kills (requirement 11) -------------------------------------------------------------------------------------------


class Killed(Exception):
    """The process is gone."""


def life(disk: dict, settings: Settings, steps: int, kill_at: float | None) -> World:
    """From what is on the disk to the end, or to the kill."""
    w = world(settings, heavy_tail(5, typical=20, longest=200), reward=0.005, batch=0.004, push=0.003, update=0.02)
    done: list = []
    if disk:
        saved = json.loads(disk["checkpoint"])
        w.scheduler.restore(saved["pipeline"])
        w.weights = {w.scheduler.step: saved["weights"]}
        w.engine.changes = [(0.0, w.scheduler.step, saved["weights"])]
        done = saved["uids"]

    def save(state) -> None:
        weights = w.weights[w.trained[-1].step + 1]
        disk["checkpoint"] = json.dumps({"pipeline": state, "weights": weights, "uids": done + w.uids})

    async def main() -> None:
        work = asyncio.ensure_future(w.train(steps, save))
        if kill_at is not None:
            asyncio.get_running_loop().call_later(kill_at, work.cancel)
        try:
            await work
        except asyncio.CancelledError:
            raise Killed from None

    simulated.run(main())
    return w


@pytest.mark.parametrize(("late", "k"), [("wait", 0), ("wait", 2), ("drop", 2), ("abort", 1)])
def test_killed_at_random_points_nothing_is_lost_or_trained_twice(late, k):
    settings = Settings(4, 3, staleness=k, late=late, in_flight=0 if late == "wait" else 6)
    reference: dict = {}
    life(reference, settings, 30, None)
    disk: dict = {}
    rng, kills = random.Random(7), 0
    while kills < 20:
        try:
            life(disk, settings, 30, rng.uniform(0.0, 0.45))
            break
        except Killed:
            kills += 1
    if kills == 20:
        life(disk, settings, 30, None)
    assert kills >= 5
    end, whole = json.loads(disk["checkpoint"]), json.loads(reference["checkpoint"])
    uids, waiting = end["uids"], [group["prompt"]["uid"] for group in end["pipeline"]["groups"]]
    assert len(uids) == 120 and len(set(uids)) == 120, "none trained twice"
    assert sorted(uids + waiting) == list(range(end["pipeline"]["prompts"])), "none lost"
    if k == 0:
        assert (end["weights"], uids) == (whole["weights"], whole["uids"]), "the very same run"


def test_settings_that_cannot_be_are_refused():
    for wrong, message in [
        (dict(groups=0, answers=1), "at least 1"), (dict(groups=1, answers=1, late="never"), "wait, drop, abort"),
        (dict(groups=4, answers=1, in_flight=3), "less than a batch of 4"),
        (dict(groups=4, answers=1, seconds=1.0), "needs late='abort'"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            Settings(**wrong)


def test_sample_rows_hold_what_was_trained_on():
    w = world(Settings(2, 2, staleness=1), lambda r: 10 + r.member, update=0.01)
    simulated.run(w.train(3))
    rows = [json.loads(json.dumps(row)) for t in w.trained for row in sample_rows(t.groups)]
    assert len(rows) == 12 and [r["member"] for r in rows] == [0, 1] * 6
    for row in rows:
        assert row["length"] == len(row["tokens"]) == len(row["versions"]) == 10 + row["member"]
        assert row["trained_at"] == row["step"] and row["source"] == "abc"[row["uid"] % 3]
        assert row["reward"] == simulated.reward_of(row["tokens"])
