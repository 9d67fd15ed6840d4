"""Rewards by comparison against the definition, written out a second time, over random scores.

Not covered: whether comparing teaches more than grading does; that is the paper's claim.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from glmv_jax.rl.rewards.rvpo import BEFORE, rvpo
from glmv_jax.typing import UserError


def played(rendered, score, form="algorithm1", polish=False, fails=()):
    """rvpo with a comparator that gives score[i] (score[BEFORE] is the last); also the pairs it was asked about."""
    asked = []

    async def compare(i, j):
        asked.append((i, j))
        await asyncio.sleep(0)
        return None if {i, j} in fails else (score[i], score[j])

    return asyncio.run(rvpo(rendered, compare, form=form, polish=polish)), asked


def defined(rendered, score, form, polish, fails):
    """The rewards of the report, a line a case."""
    N, rewards = len(rendered), []
    sure = lambda i, j: {i, j} not in fails  # noqa: E731
    in_pool = [ok and (not polish or (sure(i, BEFORE) and score[i] >= score[BEFORE])) for i, ok in enumerate(rendered)]
    for i in range(N):
        others = [j for j in range(N) if j != i and in_pool[j] and sure(i, j)]
        wins, ties = sum(score[i] > score[j] for j in others), sum(score[i] == score[j] for j in others)
        if not rendered[i]:
            rewards.append(-1.0 if form in ("algorithm1", "equation9") else 0.0)
        elif form == "drafting":
            rewards.append(score[i] if {i} not in fails else 0.0)
        elif form == "polishing":
            rewards.append(float(sure(i, BEFORE) and score[i] > score[BEFORE]))
        elif not in_pool[i]:
            rewards.append(0.0)
        else:
            rewards.append(1 + wins + ties / 2 if form == "algorithm1" else wins)
    return rewards


@pytest.mark.parametrize("form", ["algorithm1", "equation9", "drafting", "polishing"])
@pytest.mark.parametrize("polish", [False, True])
def test_rewards_are_the_reports(form, polish):
    rng = random.Random(f"{form}{polish}")
    kinds = set()
    for _ in range(100):
        N = rng.randrange(1, 7)
        rendered = [rng.random() < 0.8 for _ in range(N)]
        score = [rng.randrange(4) / 3 for _ in range(N + 1)]
        pairs = [{i, j} for i in range(-1, N) for j in range(i, N)]
        fails = [pair for pair in pairs if rng.random() < 0.1]
        outcome, asked = played(rendered, score, form, polish, fails)
        assert outcome.rewards == defined(rendered, score, form, polish or form == "polishing", fails)
        assert outcome.unsure == [any(i in {*pair} for pair in asked if {*pair} in fails) for i in range(N)]
        kinds.update(outcome.rewards)
    assert len(kinds) > 2 or form == "polishing"


def test_every_pair_is_compared_once_and_the_sides_take_turns():
    _, asked = played([True] * 6, [0.0] * 7)
    assert sorted(tuple(sorted(pair)) for pair in asked) == [(i, j) for i in range(6) for j in range(i + 1, 6)]
    for i in range(6):
        first = sum(pair[0] == i for pair in asked)
        assert first in (2, 3), "no answer always stands on the same side"


def test_a_comparator_that_prefers_one_side_favours_nobody_by_much():
    async def left(i, j):
        return 1.0, 0.0

    rewards = asyncio.run(rvpo([True] * 8, left)).rewards
    assert set(rewards) <= {4.0, 5.0} and sum(rewards) == 8 + 28


def test_breaking_the_comparator_does_not_pay():
    """The answer that breaks every comparison it is in comes last, and the order of the others stays."""
    score = [0.1, 0.9, 0.5, 0.7, 0.0]
    outcome, _ = played([True] * 4, score, fails=[{1, j} for j in (0, 2, 3)])
    assert outcome.rewards == [1.0, 1.0, 2.0, 3.0] and outcome.unsure == [True] * 4


def test_comparisons_run_together():
    most = now = 0

    async def compare(i, j):
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return 0.0, 0.0

    asyncio.run(rvpo([True] * 5, compare))
    assert most == 10


def test_an_unknown_form():
    with pytest.raises(UserError, match="nearest: equation9"):
        asyncio.run(rvpo([True], None, form="equation8"))
