"""The IoU of boxes in space against volumes counted in random points, closed forms and symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import solids
from glmv_jax.rl.rewards.solids import corners, intersection, iou, parse, rotation
from glmv_jax.rl.tasks import box3d

RNG = np.random.default_rng(0)


def random_box(spread: float = 0.8) -> tuple[float, ...]:
    return (*RNG.uniform(-spread, spread, 3), *RNG.uniform(0.3, 2.0, 3), *RNG.uniform(-math.pi, math.pi, 3))


def holds(box, points_N3: np.ndarray) -> np.ndarray:
    """Which points lie in a box: turned back into its own axes, one angle after the other."""
    x, y, z = (points_N3 - np.array(box[:3])).T
    roll, pitch, yaw = box[6:]
    x, y = math.cos(roll) * x + math.sin(roll) * y, -math.sin(roll) * x + math.cos(roll) * y
    x, z = math.cos(yaw) * x - math.sin(yaw) * z, math.sin(yaw) * x + math.cos(yaw) * z
    y, z = math.cos(pitch) * y + math.sin(pitch) * z, -math.sin(pitch) * y + math.cos(pitch) * z
    return (np.abs(np.stack([x, y, z], 1)) <= np.array(box[3:6]) / 2).all(1)


def test_intersection_is_that_of_counted_points():
    """Random points in the first box: the share that lies in the second is the shared volume; five deviations."""
    count, positive = 20_000, 0
    for _ in range(40):
        a, b = random_box(), random_box()
        inside_N3 = (RNG.uniform(-0.5, 0.5, (count, 3)) * a[3:6]) @ rotation(*a[6:]).T + np.array(a[:3])
        assert holds(a, inside_N3).mean() > 0.999
        share, volume = holds(b, inside_N3).mean(), math.prod(a[3:6])
        deviation = volume * math.sqrt(max(share * (1 - share), 1 / count) / count)
        assert abs(intersection(a, b) - share * volume) <= 5 * deviation
        positive += share > 0.02
    assert positive > 20


def test_closed_forms():
    cube = (0, 0, 0, 1, 1, 1, 0, 0, 0)
    assert iou(cube, cube) == pytest.approx(1, abs=1e-12)
    assert iou(cube, (0.5, 0, 0, 1, 1, 1, 0, 0, 0)) == pytest.approx(1 / 3)
    assert iou(cube, (0, 0, 0, 0.5, 0.5, 0.5, 0.3, 0.2, 0.1)) == pytest.approx(1 / 8)  # one within the other
    octagon = 2 * (math.sqrt(2) - 1)  # two unit squares at 45 degrees
    assert iou(cube, (0, 0, 0, 1, 1, 1, 0, 0, math.pi / 4)) == pytest.approx(octagon / (2 - octagon))
    assert intersection(cube, (1, 0, 0, 1, 1, 1, 0, 0, 0)) == 0  # face to face
    assert intersection(cube, (1, 1, 1, 1, 1, 1, 0, 0, 0)) == 0  # corner to corner
    assert iou(cube, (5, 0, 0, 1, 1, 1, 1, 1, 1)) == 0
    thin = (0, 0, 0, 1e-4, 1, 1, 0, 0, 0.2)
    assert intersection(cube, thin) == pytest.approx(1e-4, rel=0.03)


def test_symmetries():
    """Of the pair, of common motion and scale, and of other numbers for one solid."""
    for _ in range(30):
        a, b = random_box(0.4), random_box(0.4)
        assert iou(a, b) == pytest.approx(iou(b, a), abs=1e-9)
        shift = RNG.uniform(-3, 3, 3)
        moved = [(*(np.array(box[:3]) + shift), *box[3:]) for box in (a, b)]
        scaled = [(*(10 * np.array(box[:6])), *box[6:]) for box in (a, b)]
        assert iou(*moved) == pytest.approx(iou(a, b), abs=1e-9) == pytest.approx(iou(*scaled), abs=1e-9)
        flat = (*a[:6], 0.0, 0.0, a[8])
        turned = (*a[:3], a[5], a[4], a[3], 0.0, 0.0, a[8] + math.pi / 2)  # sides exchanged, a quarter turn about y
        assert iou(flat, turned) == pytest.approx(1, abs=1e-9)
        assert iou(flat, (*flat[:8], flat[8] + math.pi)) == pytest.approx(1, abs=1e-9)


def test_corners():
    """The order of angles: pitch about x first, then yaw about y, then roll about z; y is down, z forward."""
    quarter = math.pi / 2
    assert rotation(0, 0, quarter) @ [0, 0, 1] == pytest.approx([1, 0, 0], abs=1e-12)
    assert rotation(quarter, 0, 0) @ [1, 0, 0] == pytest.approx([0, 1, 0], abs=1e-12)
    assert rotation(0, quarter, 0) @ [0, 1, 0] == pytest.approx([0, 0, 1], abs=1e-12)
    assert rotation(quarter, quarter, 0) @ [0, 1, 0] == pytest.approx([0, 0, 1], abs=1e-12)
    assert np.ptp(corners((1, 2, 3, 4, 6, 8, 0, 0, 0)), axis=0) == pytest.approx([4, 6, 8])


@pytest.mark.parametrize(("content", "boxes"), [
    ("[[1,2,3,1,1,1,0,0,-0.5]]", 1),
    ('[{"bbox_3d": [1, 2, 3, 1, 1, 1, 0, 0, 0.5], "label": "red"}]', 1),
    ("[1,2,3,1,1,1,0,0,0],[1,2,3,1,1,1,0,0,0]", 2),
    ("[[1,2,3,1,1,1,0,0]]", 0), ("[[1,2,3,1,1,0,0,0,0]]", 0), ("[[1,2,3,-1,1,1,0,0,0]]", 0), ("1,2,3,1,1,1,0,0,0", 0),
    ("[[1,2,3,1,1,1,0,0,nan]]", 0), ("[[1,2,3,1,1,1,0,0,1e5]]", 0), ("[[1,2,3,1,1,1,0,0,0],[0,0,0]]", 0), ("", 0),
])  # fmt: skip
def test_parse(content, boxes):
    assert len(parse(content) or ()) == boxes


def test_rule():
    gold = "[[0,0,5,1,1,1,0,0,0],[3,0,5,1,1,1,0,0,0]]"
    sample, rule = Sample("b/0", "b", (), "?", gold), solids.boxes(threshold=0.5)
    assert rule(gold, sample) == (1.0, True)
    assert rule("[[3,0,5,1,1,1,0,0,0],[0,0,5,1,1,1,0,0,0]]", sample)[0] == pytest.approx(1)
    one = rule("[[0,0,5,1,1,1,0,0,0]]", sample)
    assert one[0] == pytest.approx(0.5) and not one[1]
    near = rule("[[0,0,5.2,1,1,1,0,0,0],[3,0,5,1,1,1,0,0,0]]", sample)
    assert near[1] and near[0] == pytest.approx((0.8 / 1.2 + 1) / 2)


def test_blocks_are_drawn_where_their_numbers_say():
    """The box of the pixels of a lone block is that of its eight corners, projected by hand."""
    seen = 0
    for split in ("train", "heldout"):
        for seed in range(12):
            sample = box3d.generate(np.random.default_rng(seed), split)
            if sample.meta["others"]:
                continue
            pixels = np.asarray(sample.images[0], np.int32)
            coloured = np.ptp(pixels, axis=-1) > 60  # walls and floors are pale
            rows, columns = np.nonzero(coloured.any(1))[0], np.nonzero(coloured.any(0))[0]
            x, y, z = corners(parse(sample.answer)[0]).T
            u, v = 60 * x / z + 32, 60 * y / z + 24
            extent = (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1)
            assert np.abs(np.array(extent) - (u.min(), u.max(), v.min(), v.max())).max() < 1.3, sample.answer
            assert y.max() == pytest.approx(1.6, abs=0.011)  # on the floor
            seen += 1
    assert seen > 8
