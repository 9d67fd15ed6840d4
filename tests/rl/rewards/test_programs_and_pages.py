"""Tasks whose grades start processes, through the reward system and its workers: programs, drawings, pages; and the
pages of a group compared (RVPO) by rule, as no judge is needed to tell which is nearer."""

from __future__ import annotations

import pytest

from glmv_jax.agents import browser, sandbox
from glmv_jax.rl import tasks
from glmv_jax.rl.rewards.config import of_tasks
from glmv_jax.rl.rewards.system import RewardSystem
from glmv_jax.rl.task import box
from glmv_jax.typing import UserError

LACKS = browser.missing() or sandbox.missing()
PAGES = "glmv_jax.rl.tasks.ui_code"


@pytest.fixture(scope="module")
def rewards():
    if LACKS:
        pytest.skip(LACKS)
    given = of_tasks(["code", "svg", "ui_code"], workers=1)
    assert given["sources"]["svg"]["parts"]["task"]["limit"] is None
    given["sources"]["ui_code"]["group"] = {
        "render": f"{PAGES}:render", "limit": 90.0,
        "comparator": {"kind": "rule", "rule": f"{PAGES}:nearer", "limit": 30.0},
    }  # fmt: skip
    with RewardSystem(given) as system:
        yield system


def test_programs_and_drawings_are_graded_in_workers(rewards):
    for name in ("code", "svg"):
        sample = tasks.get(name).source("train", 0)[0]
        wrong = tasks.get(name).hacks(sample)[0]
        right, low = rewards.score([sample] * 2, [box(sample.answer), box(wrong)])
        assert right == tasks.get(name).verifier(box(sample.answer), sample) and right.reward == 1.0
        assert low == tasks.get(name).verifier(box(wrong), sample) and low.reward < 0.5


def test_a_group_of_pages_is_ranked_by_what_is_seen(rewards):
    drawn = map(tasks.get("ui_code").source("train", 0).__getitem__, range(12))
    sample = next(sample for sample in drawn if "12px sans" in sample.answer)
    padded = lambda pixels: box(sample.answer.replace("padding:4px", f"padding:{pixels}px"))  # noqa: E731
    # White, as most of the page is; three that are padded too much; the page; it without a box; no page.
    answers = [box("<p></p>"), padded(6), padded(4), sample.answer, padded(5), box("I would rather not."), padded(5)]
    grades = rewards.score([sample] * len(answers), answers)
    # Of the five that were rendered: 1, one for each that is farther, one half for each that is as near.
    assert [grade.reward for grade in grades] == [1.0, 2.0, 5.0, -1.0, 3.5, -1.0, 3.5]
    assert [grade.flags for grade in grades if grade.reward < 0] == [("no_box", "no_render"), ("no_render",)]
    assert [grade.correct for grade in grades][:4] == [False, False, True, False] and grades[4] == grades[6]
    assert all(grade.components["render"] == (grade.reward > 0) for grade in grades)


def test_what_cannot_be_graded_here_is_told_before_the_run(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="Chromium"):
        of_tasks(["count", "ui_code"])
