"""Every task's grader pays for the gold answer and for nothing else; and a careless grader is caught by that check."""

from __future__ import annotations

import pytest

from glmv_jax.data.questions import DESCRIPTIONS, KINDS
from glmv_jax.rl import tasks
from glmv_jax.rl.rewards import boxed, geometry, text
from glmv_jax.rl.rewards.grade import RIGHT, WRONG, Grade
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import visual
from glmv_jax.typing import UserError


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_grader_pays_for_the_gold_answer_only(name, split):
    tasks.get(name).validate(count=60, split=split)


def test_every_question_with_an_answer_to_check_is_a_task():
    assert set(tasks.TASKS) == set(KINDS) - set(DESCRIPTIONS)


def mentions(content, sample):
    """The classic mistake: the gold answer somewhere in the text is enough."""
    return RIGHT if sample.answer in content else WRONG


def unboxed(answer_text, sample):
    return Grade(1.0, True, {}) if sample.answer in answer_text else Grade(0.0, False, {})


@pytest.mark.parametrize("task", [
    Task("count", boxed(mentions), visual.other_numbers),
    Task("spatial", boxed(mentions), visual.choices),
    Task("read", unboxed, visual.misread),
    Task("read", boxed(text.exact, format_weight=0.6)),
    Task("ground", boxed(geometry.boxes(threshold=0.01, graded=0.0)), visual.showers),
    Task("point", boxed(geometry.point(reach=1e9, graded=1.0)), visual.scattered),
    Task("count", boxed(lambda content, sample: WRONG)),
], ids=lambda task: task.name)  # fmt: skip
def test_careless_graders_are_caught(task):
    with pytest.raises(ValueError, match=rf"{task.name}/train/\d+: the (gold|wrong) answer"):
        task.validate(count=60)


def test_unknown_tasks_are_named():
    with pytest.raises(UserError, match="task 'cuont' does not exist; nearest: count"):
        tasks.verifiers(["cuont"])
