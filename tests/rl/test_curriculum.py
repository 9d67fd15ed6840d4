"""The curriculum with a simulated policy whose pass rates are known."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from glmv_jax.rl.curriculum import Curriculum, Expansion, Item, kept, most_balanced, useful
from glmv_jax.rl.pipeline import Completion, Drawn, Group, Member, Prompt, Scheduler, Settings
from glmv_jax.rl.rewards import Grade
from glmv_jax.typing import UserError
from tests.rl import simulated
from tests.rl.simulated import Engine, World

# Half of the prompts are too easy and a third too hard, as GLM-V found after 200 steps.
RATES = np.repeat([0.01, 0.3, 0.5, 0.7, 0.99], [30, 6, 8, 6, 50])
SIZE = 8


def group(prompt: Prompt, correct: np.ndarray) -> Group:
    nothing = Completion(Drawn(*(np.zeros(0, np.int32),) * 3), "stop")
    return Group(prompt, [Member(answer=nothing, grade=Grade(float(c), bool(c), {})) for c in correct])


def rolled(curriculum: Curriculum, rng: np.random.Generator, steps: int, batch: int = 32) -> list[list[Group]]:
    found = []
    for _ in range(steps):
        prompts = [curriculum.draw() for _ in range(batch)]
        found.append([group(p, rng.random(SIZE) < RATES[p.key % len(RATES)]) for p in prompts])
        curriculum.learn(found[-1])
    return found


def share_useful(batches: list[list[Group]]) -> float:
    return float(np.mean([useful(group) for batch in batches for group in batch]))


def test_more_groups_teach_something_than_when_all_prompts_are_drawn_alike():
    items = [Item(i, "s") for i in range(len(RATES))]
    rng = np.random.default_rng(0)
    alike = share_useful(rolled(Curriculum(items, {"s": 1.0}, w_min=1.0), rng, 60))
    learnt = share_useful(rolled(Curriculum(items, {"s": 1.0}), rng, 60)[30:])
    exact = np.mean(1 - RATES**SIZE - (1 - RATES) ** SIZE)
    assert alike == pytest.approx(exact, abs=0.04), "uniform sampling is what it should be"
    assert learnt >= 1.5 * alike, (learnt, alike)
    # Pass rates that are known beforehand help from the first step.
    known = Curriculum([Item(i, "s", float(p)) for i, p in enumerate(RATES)], {"s": 1.0})
    assert share_useful(rolled(known, rng, 20)) >= 1.5 * alike


def test_sources_keep_their_share_and_no_tier_dies():
    items = [Item(i, "easy" if i >= 50 else "mixed", float(p)) for i, p in enumerate(RATES)]
    curriculum = Curriculum(items, {"mixed": 3.0, "easy": 1.0})
    counts = collections.Counter(g.prompt.source for b in rolled(curriculum, np.random.default_rng(1), 40) for g in b)
    assert counts["mixed"] / counts.total() == pytest.approx(0.75, abs=0.03)
    p = curriculum.probabilities()
    assert p.sum() == pytest.approx(1.0) and (p > 0).all() and p[:30].max() < 0.2 * p[36:44].min()


def test_weight_of_a_tier_is_the_variance_of_its_pass_rate():
    rates = [0.05, 0.5, 0.8, 0.3]
    p = Curriculum([Item(i, "s", r) for i, r in enumerate(rates)], {"s": 1.0}, w_min=0.25).probabilities()
    weights = np.array([0.25, 1.0, 0.64, 0.84])
    np.testing.assert_allclose(p, weights / weights.sum())


def test_it_goes_on_where_it_was_and_items_are_drawn_by_number():
    items = [Item(["level", i], "s") for i in range(5)]
    one, rng = Curriculum(items, {"s": 1.0}, seed=3), np.random.default_rng(2)
    rolled(one, rng, 3)
    state = json.loads(json.dumps(one.get_state()))
    ahead = [one.draw() for _ in range(20)]
    two = Curriculum(items, {"s": 1.0}, seed=3)
    two.set_state(state)
    assert [two.draw() for _ in range(20)] == ahead and ahead[0].uid == 96
    times = collections.defaultdict(list)
    for prompt in ahead:
        item, time = one.located(prompt.key)
        times[item].append(time)
    assert all(list(np.diff(t)) == [1] * (len(t) - 1) for t in times.values()), "an item's samples in turn, none twice"
    other = Curriculum(items, {"s": 1.0}, seed=4)
    other.set_state(state)
    assert [other.draw() for _ in range(20)] != ahead
    with pytest.raises(UserError, match="5 items and this one 4"):
        Curriculum(items[:4], {"s": 1.0}).set_state(state)
    with pytest.raises(UserError, match="share and without items.*other"):
        Curriculum(items, {"s": 1.0, "other": 1.0})


@pytest.mark.parametrize("useless", [0.2, 0.5, 0.75])
def test_expansion_converges_to_what_makes_up_for_useless_groups(useless):
    rng, expansion, seen = np.random.default_rng(0), Expansion(decay=0.95), []
    for _ in range(400):
        seen.append(expansion.update(int((rng.random(128) < useless).sum()), 128))
    assert np.mean(seen[100:]) == pytest.approx(1 / (1 - useless), rel=0.05)
    assert expansion.groups(100) == np.ceil(100 * expansion.ratio)


def test_expansion_is_bounded():
    expansion = Expansion(decay=0.0, most=4.0)
    assert expansion.groups(7) == 7
    assert expansion.update(8, 8) == 4.0 and expansion.update(31, 32) == 4.0 and expansion.groups(7) == 28


def test_the_most_balanced_groups_are_kept():
    correct = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], bool)
    assert list(most_balanced(correct, 3)) == [2, 4, 1]


def test_what_is_kept_differs_in_rewards_though_none_is_right():
    """Graded rewards: a group of half-right answers teaches, one that is right throughout does not."""
    prompt, wrong = Prompt(0, 0, "s"), group(Prompt(0, 0, "s"), np.zeros(4))
    partly = group(prompt, np.zeros(4))
    partly.members[0].grade = Grade(0.4, False, {})
    even, all_right = group(prompt, np.array([1, 1, 0, 0])), group(prompt, np.ones(4))
    groups = [wrong, partly, all_right, even]
    assert kept(groups, 3) == [1, 3] and kept(groups, 1) == [3] and kept([wrong, all_right], 2) == [0]


def test_it_feeds_a_pipeline_that_expands_its_steps():
    """Curriculum, dynamic sampling and expansion in one run: batches of useful groups, over-asked just enough."""
    items = [Item(i, "s", float(p)) for i, p in enumerate(RATES)]
    curriculum, expansion, notes = Curriculum(items, {"s": 1.0}), Expansion(), []
    scheduler = Scheduler(curriculum, Settings(8, SIZE, staleness=1, late="abort", in_flight=8), notes.append, useful)
    world = World(scheduler, Engine(lambda r: 20), update=0.01)
    rng = np.random.default_rng(5)

    async def grade(request, completion):
        right = rng.random() < RATES[request.prompt.key % len(RATES)]
        return Grade(float(right), bool(right), {})

    plain = world.update

    async def update(taken):
        filtered = sum(n["kind"] == "filtered" for n in notes)
        notes.clear()
        expansion.update(filtered, filtered + len(taken.groups))
        scheduler.in_flight = expansion.groups(8)
        await plain(taken)

    world.grade, world.update = grade, update
    simulated.run(world.train(30))
    assert all(useful(g) and len(t.groups) == 8 for t in world.trained for g in t.groups)
    assert 8 < scheduler.in_flight < 16 and len(set(world.uids)) == 240
    assert (curriculum.passes != RATES).any(), "it learns from the batches"
