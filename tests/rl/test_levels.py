"""Levels of tasks: every sample has one, every level has samples, and they are found by number."""

from __future__ import annotations

import collections

import pytest

from glmv_jax.data.records import Sample
from glmv_jax.rl import levels, tasks

LEVELED = [name for name, task in tasks.TASKS.items() if task.levels.count > 1 and not task.missing()]


@pytest.mark.parametrize("name", LEVELED)
def test_every_level_of_a_task_is_drawn_often_enough(name):
    task = tasks.get(name)
    plain = task.source("train", 3)
    counts = collections.Counter(task.levels.of(plain[i]) for i in range(40))
    assert set(counts) == set(range(task.levels.count)) and min(counts.values()) >= 2, counts


@pytest.mark.parametrize("name", ["count", "geometry", "ground"])  # a kind of question; tasks by kind and by size
def test_samples_of_a_level_are_those_of_the_task(name):
    task = tasks.get(name)
    plain, seen = task.source("train", 0), set()
    for level in range(task.levels.count):
        source = task.source("train", 0, level)
        for i in range(3):
            sample = source[i]
            assert task.levels.of(sample) == level and source[i] == sample
            assert plain[int(sample.id.rpartition("/")[2])] == sample
            seen.add(sample.id)
    assert len(seen) == 3 * task.levels.count, "none twice"


def test_a_level_that_does_not_occur_is_an_error():
    sample = Sample("s", "s", (), "?", "1")
    source = levels.OfLevel([sample] * 1000, levels.by(lambda s: int(s.answer), 5), 1)
    with pytest.raises(ValueError, match="none of 256 samples, such as s, is of level 1"):
        source[2]


def test_measures():
    sample = lambda answer="", **meta: Sample("s", "s", (), "?", answer, meta=meta)  # noqa: E731
    assert [levels.by_length(2, 4).of(sample("x" * n)) for n in (1, 2, 3, 4, 9)] == [0, 1, 1, 2, 2]
    assert [levels.by_count("<", 2).of(sample(text)) for text in ("<", "<<")] == [0, 1]
    assert [levels.by_number("others", 2).of(sample(**meta)) for meta in ({}, {"others": [1, 2]})] == [0, 1]
    kinds = levels.by_kind("form", "a", ("b", "c"), "d")
    assert [kinds.of(sample(form=form)) for form in "abcdx"] == [0, 1, 1, 2, 2] and kinds.count == 3
    sized = levels.by_size(0.5, 0.1)
    assert [sized.of(sample(boxes=[[0, 0, side, side]])) for side in (900, 500, 100)] == [0, 1, 2]
