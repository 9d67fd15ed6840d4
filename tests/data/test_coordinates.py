"""Coordinates: ranges and round trips at many sizes, tolerant parsing, IoU against counted pixels."""

from __future__ import annotations

import numpy as np
import pytest

from glmv_jax.data import coordinates

SIZES = [(1, 1), (7, 5), (64, 64), (64, 48), (333, 1000), (999, 1001), (1920, 1080), (8000, 20)]


@pytest.mark.parametrize("width,height", SIZES)
def test_round_trip_is_within_half_a_step_except_at_the_far_edge(width, height):
    for size in (width, height):
        for pixel in np.linspace(0, size, 257):
            written = coordinates.encode(pixel, size)
            assert 0 <= written <= 999
            step = size / 1000
            # 1000 is clamped to 999, so the far edge is off by a whole step.
            assert abs(coordinates.decode(written, size) - pixel) <= step * (0.5 if pixel < size * 0.9985 else 1) + 1e-9


def test_every_written_number_is_a_fixed_point():
    for size in (1, 64, 333, 1920):
        assert [coordinates.encode(coordinates.decode(v, size), size) for v in range(1000)] == list(range(1000))


def test_outside_the_image_is_clamped():
    assert coordinates.encode(-3, 64) == 0
    assert coordinates.encode(65, 64) == 999
    assert coordinates.decode(1000, 64) == 64


def test_box_uses_width_for_x_and_height_for_y():
    box = coordinates.encode_box((10, 20, 30, 40), 100, 50)
    assert box == (100, 400, 300, 800)
    assert coordinates.decode_box(box, 100, 50) == pytest.approx((10, 20, 30, 40))
    assert coordinates.encode_point((10, 20), 100, 50) == (100, 400)
    assert coordinates.decode_point((100, 400), 100, 50) == pytest.approx((10, 20))


def test_formatting_is_what_the_parser_reads():
    boxes = [(1, 2, 3, 4), (500, 600, 700, 999)]
    assert coordinates.format_lists(boxes) == "[[1,2,3,4],[500,600,700,999]]"
    assert coordinates.parse_boxes(coordinates.format_lists(boxes)) == boxes
    assert coordinates.format_lists([(5, 6)]) == "[[5,6]]"
    assert coordinates.parse_points("[[5,6]]") == [(5, 6)]


@pytest.mark.parametrize("text", [
    "[[10,20,30,40]]", "[10, 20, 30, 40]", "(10,20,30,40)", "<10 20 30 40>", "{10;20;30;40}", "10, 20, 30, 40",
    "(10,20),(30,40)", "[[10, 20], [30, 40]]", '{"bbox_2d": [10, 20, 30, 40], "label": "cat"}', "[[30,40,10,20]]",
    "The cat 2 is at [10.0, 20.0, 30.0, 40.0].", "box: x1=1 [10,20,30,40] (see above)",
    "x1=10, y1=20, x2=30, y2=40",
])
def test_parser_is_tolerant_of_style(text):
    assert coordinates.parse_boxes(text) == [(10, 20, 30, 40)]


@pytest.mark.parametrize("text", ["", "no box", "[1,2,3]", "[10,20,30,2000]", "[-5,20,30,40]", "[[", "[[1,2,3,4", "[]"])
def test_what_is_no_box_is_dropped_not_raised(text):
    if text != "[[1,2,3,4":  # cut by the token limit, but all four numbers are there
        assert coordinates.parse_boxes(text) == []
    else:
        assert coordinates.parse_boxes(text) == [(1, 2, 3, 4)]


def test_parser_accepts_1000_and_points():
    assert coordinates.parse_boxes("[[0,0,1000,1000]]") == [(0, 0, 1000, 1000)]
    assert coordinates.parse_points("(12, 34) and [[56,78]]") == [(12, 34), (56, 78)]
    assert coordinates.parse_points("[[1,2,3,4]]") == []
    assert coordinates.parse_points("7 8") == [(7, 8)]


def test_iou_equals_counted_pixels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        boxes = rng.integers(0, 20, (2, 4))
        masks = np.zeros((2, 20, 20), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes):
            mask[y1:y2, x1:x2] = True  # an inverted box masks nothing
        counted = (masks[0] & masks[1]).sum() / max(1, (masks[0] | masks[1]).sum())
        assert coordinates.iou(*boxes) == pytest.approx(counted)
        assert coordinates.iou_matrix(boxes[:1], boxes[1:])[0, 0] == pytest.approx(counted)


def test_iou_matrix_of_many_equals_pairs():
    rng = np.random.default_rng(1)
    a, b = np.sort(rng.uniform(0, 1000, (5, 2, 2)), 1).reshape(5, 4), np.sort(rng.uniform(0, 1000, (3, 2, 2)), 1)
    b = b.reshape(3, 4)
    expected = [[coordinates.iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(coordinates.iou_matrix(a, b), expected, atol=1e-12)
    assert coordinates.iou_matrix(np.zeros((0, 4)), b).shape == (0, 3)


def test_inside_counts_the_edges():
    assert coordinates.inside((10, 20), (10, 20, 30, 40))
    assert coordinates.inside((30, 40), (10, 20, 30, 40))
    assert not coordinates.inside((31, 30), (10, 20, 30, 40))
    assert not coordinates.inside((20, 10), (10, 20, 30, 40))
