"""Labels that only a crop shows: the overview hides them, the crop shows them; and comparisons of several pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from glmv_jax.data import coordinates
from glmv_jax.data.questions import read
from glmv_jax.rl import tasks
from glmv_jax.rl.tasks import crop_read


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_overview_hides_what_the_crop_shows(split):
    source = tasks.get("crop_read").source(split, 0)
    for i in range(8):
        sample = source[i]
        assert read.belongs(sample.answer, split)
        (small,) = sample.images
        large = crop_read.full(sample)
        assert crop_read.overview(large).tobytes() == small.tobytes() and large.size == (crop_read.SIDE,) * 2
        # Where the large picture changes with the label is the label's box.
        facts = json.loads(json.dumps(sample.meta))
        facts["things"][0]["label"] = ""
        rows, columns = np.nonzero((np.asarray(crop_read.draw(facts)) != np.asarray(large)).any(-1))
        changed = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        label = crop_read.label_box(sample.meta["things"][0], sample.meta["face"])
        assert np.abs(np.subtract(changed, label)).max() <= 1
        # In the overview it is lower than two pixels, in a crop of it the letters have their own height.
        assert (label[3] - label[1]) / crop_read.SHRINK < 2 and label[3] - label[1] >= 8
        (box,) = sample.meta["boxes"]
        part = np.asarray(crop_read.crop(sample, box))
        assert abs(part.shape[0] - (label[3] - label[1])) <= 2 and abs(part.shape[1] - (label[2] - label[0])) <= 2
        assert part.min() < 60 and part.max() > 200


def test_the_same_questions_with_their_large_pictures():
    small, large = tasks.get("crop_read").source("heldout", 3)[5], crop_read.Whole("heldout", 3)[5]
    assert crop_read.overview(large.images[0]).tobytes() == small.images[0].tobytes()
    assert (large.id, large.prompt, large.answer, large.meta) == (small.id, small.prompt, small.answer, small.meta)


def test_crops_stay_inside_and_within_their_size():
    sample = tasks.get("crop_read").source("train", 0)[0]
    for box in [(0, 0, 0, 0), (999, 999, 1000, 1000), (0, 0, 1000, 1000), (500, 0, 400, 900), (-50, -9, 3000, 20)]:
        part = crop_read.crop(sample, box)
        assert 1 <= min(part.size) and max(part.size) <= 64
    whole = np.asarray(crop_read.full(sample))
    box = coordinates.encode_box((96, 48, 128, 80), crop_read.SIDE, crop_read.SIDE)
    np.testing.assert_array_equal(np.asarray(crop_read.crop(sample, box)), whole[48:80, 96:128])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_one_picture_is_the_one_that_was_asked_for(split):
    source, chosen = tasks.get("compare").source(split, 0), []
    for i in range(60):
        sample = source[i]
        numbers = sample.meta["numbers"]
        assert len(sample.images) == len(numbers) and numbers.count(max(numbers)) == 1
        assert numbers[int(sample.answer) - 1] == max(numbers)
        chosen.append((len(numbers), int(sample.answer)))
    assert len(set(chosen)) == 2 + 3 + 4  # every place among two, three and four
