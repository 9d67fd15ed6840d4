"""The graders against slow independent definitions, hostile strings and cheats.

Not covered: graders that never return; these run in processes, see tests/rl/rewards.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import sys
import time

import numpy as np
import pytest

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import boxed, extract_box, geometry, score, text
from glmv_jax.rl.rewards.grade import MAX_CONTENT
from glmv_jax.rl.task import box
from glmv_jax.typing import UserError


def sample(answer: str, **meta) -> Sample:
    return Sample("s/0", "s", (), "?", answer, meta=meta)


RULES = {
    "exact": (text.exact, sample("red", aliases=["crimson"])),
    "reading": (text.reading, sample("AB7")),
    "number": (text.number(relative=0.05), sample("40")),
    "label": (text.number(), sample("B")),
    "boxes": (geometry.boxes(), sample("[[100,100,300,300]]")),
    "two boxes": (geometry.boxes(), sample("[[100,100,300,300],[500,500,900,900]]")),
    "point": (geometry.point(reach=100, graded=0.3), sample("[[200,200]]", boxes=[[100, 100, 300, 300]])),
}


def value(rule: str, content: str) -> float:
    function, gold = RULES[rule]
    return function(content, gold).value


# --- the box ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "content", "flag"), [
    (box("3"), "3", ""),
    ("I count them: " + box(" 3 ") + ".", "3", ""),
    ("3", "", "no_box"),
    ("", "", "no_box"),
    ("<|begin_of_box|>3", "", "no_box"),
    ("3<|end_of_box|>", "", "no_box"),
    ("<|end_of_box|>3<|begin_of_box|>", "", "no_box"),
    (box("2") + box("3"), "", "many_boxes"),
    (box(box("3")), "", "many_boxes"),
    (box("3") + "<|end_of_box|>", "", "many_boxes"),
    (box(" \t\n"), "", "empty_box"),
    (box("x" * (MAX_CONTENT + 1)), "", "long_box"),
    ("<|BEGIN_OF_BOX|>3<|END_OF_BOX|>", "", "no_box"),
])  # fmt: skip
def test_exactly_one_box(answer, content, flag):
    assert extract_box(answer) == (content, flag)


def test_reward_is_form_and_correctness():
    verify = boxed(text.exact, format_weight=0.2)
    right, wrong, bare = (verify(a, sample("red")) for a in (box("red"), box("blue"), "red"))
    assert (right.reward, right.correct) == (1.0, True)
    assert (wrong.reward, wrong.correct, wrong.components) == (0.2, False, {"format": 1.0, "score": 0.0})
    assert (bare.reward, bare.correct, bare.flags) == (0.0, False, ("no_box",))
    with pytest.raises(ValueError):
        boxed(text.exact, format_weight=1.0)


# --- words and numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "right"), [
    ("red", True), (" RED\n", True), ("Ｒｅｄ", True), ("Crimson", True), ("red.", False), ("red red", False),
    ("red or blue", False), ("re d", False), ("", False), ("rеd", False),  # the last e is Cyrillic
])  # fmt: skip
def test_exact(content, right):
    assert value("exact", content) == float(right)


@pytest.mark.parametrize(("content", "right"), [
    ("40", True), ("+40", True), ("40.0", True), ("４０", True), ("42", True), ("38", True), ("42.1", False),
    ("37.9", False), ("-40", False), ("4e1", False), ("1e999", False), ("nan", False), ("inf", False), ("0x28", False),
    ("about 40", False), ("40 41", False), ("40-41", False), ("a number between 0 and 100", False), ("四十", False),
    ("4,0", False), ("0,040", True), ("9" * 400, False), ("40" + "0" * 15, False), ("٤٠", False),
])  # fmt: skip
def test_number(content, right):
    assert value("number", content) == float(right)


def test_number_tolerances():
    assert text.parse_number("1,234,567.5") == 1234567.5
    grade = lambda content, gold, rule=None, **meta: (rule or text.number())(content, sample(gold, **meta)).correct  # noqa: E731
    assert grade("0.3", "0.30000") and not grade("3", "4")
    assert grade("5", "4", tolerance=1) and not grade("5.01", "4", tolerance=1)
    assert grade("10.4", "10", text.number(absolute=0.4)) and not grade("10.5", "10", text.number(absolute=0.4))
    assert grade("b", "B") and not grade("A", "B")


@functools.cache
def recursive_distance(a: str, b: str) -> int:
    """The definition of Levenshtein's distance, three branches."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        recursive_distance(a[1:], b) + 1,
        recursive_distance(a, b[1:]) + 1,
        recursive_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distance_is_levenshteins():
    words = ["".join(w) for n in range(5) for w in itertools.product("ab", repeat=n)] + ["kitten", "sitting", "水火木"]
    for a, b in itertools.product(words, repeat=2):
        assert text.edit_distance(a, b) == recursive_distance(a, b)
    assert text.similarity("", "") == 1.0 and text.similarity("ab", "") == 0.0
    assert text.similarity("abcd", "abxd") == 0.75


def test_reading_is_graded_and_keeps_case():
    assert value("reading", "AB7") == 1.0 and value("reading", "AB1") == pytest.approx(2 / 3)
    assert value("reading", "ab7") == pytest.approx(1 / 3) and value("reading", "ＡＢ７") == 1.0
    assert not text.reading("AB1", sample("AB7")).correct
    assert value("reading", "AB7" * 20) == 0.0


# --- boxes and points -------------------------------------------------------------------------------------------------


def raster_iou(a, b) -> float:
    """Cells of a fine grid inside both, over those inside either."""
    y, x = np.mgrid[0:1000, 0:1000] + 0.5
    inside = lambda r: (x > r[0]) & (x < r[2]) & (y > r[1]) & (y < r[3])  # noqa: E731
    return (inside(a) & inside(b)).sum() / (inside(a) | inside(b)).sum()


def test_one_box_is_half_iou_half_hit():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x1, y1 = rng.integers(0, 250, 2)
        other = [int(v) for v in (x1, y1, x1 + rng.integers(50, 300), y1 + rng.integers(50, 300))]
        iou = raster_iou((100, 100, 300, 300), other)
        grade = geometry.boxes()(str([other]), RULES["boxes"][1])
        assert grade.value == pytest.approx(0.5 * iou + 0.5 * (iou >= 0.5), abs=1e-9)
        assert grade.correct == (iou >= 0.5)


def test_several_boxes_are_matched_and_surplus_is_paid_for():
    first, second, far = "[100,100,300,300]", "[500,500,900,900]", "[0,900,50,950]"
    assert value("two boxes", f"[{second},{first}]") == 1.0
    assert value("two boxes", f"[{first}]") == 0.5
    assert value("two boxes", f"[{first},{first}]") == 0.5, "one gold box pays once"
    assert value("two boxes", f"[{first},{second},{far},{far}]") == 0.5
    assert value("boxes", "[" + ",".join([first] * 65) + "]") == 0.0
    assert value("boxes", f"[{first},{far}]") == 0.5 and value("boxes", "[[0,0,999,999]]") < 0.05


@pytest.mark.parametrize(("content", "wanted"), [
    ("[[200,200]]", 1.0), ("[[100,300]]", 1.0), ("(150, 250)", 1.0),
    ("[[350,200]]", 0.15),  # 50 of 100 thousandths away: half of 0.3
    ("[[330,340]]", 0.15), ("[[401,200]]", 0.0), ("[[200,200],[200,200]]", 0.0), ("[[200,200,200,200]]", 0.0),
    ("[[1200,200]]", 0.0), ("200", 0.0), ("here", 0.0),
])  # fmt: skip
def test_point(content, wanted):
    assert value("point", content) == pytest.approx(wanted)
    function, gold = RULES["point"]
    assert function(content, gold).correct == (wanted == 1.0)


# --- anything a model may write ---------------------------------------------------------------------------------------


def hostile(rng: random.Random) -> str:
    """A string of odd pieces: unicode of every plane, lone surrogates, brackets, numbers at and beyond the limits."""
    pieces = [
        "<|begin_of_box|>", "<|end_of_box|>", "[[", "]]", "[", "]", "(", "{", "<", ",", ":", "-", ".", "1e999", "NaN",
        "inf", "-0", "1" * 400, "٣٤", "½", "①", "\u202e", "\x00", "\ud800", "ﷺ", "İ", "ß", "\n", " ", "0", "999",
        "1000", "100,100,300,300", "red", "AB7", "40", "</think>", '{"bbox_2d": [1,2,3,4]}', "é" * 30, "e\u0301" * 20,
    ]  # fmt: skip
    pieces += [chr(rng.randrange(sys.maxunicode + 1)) for _ in range(10)]
    body = "".join(rng.choice(pieces) for _ in range(rng.randrange(30)))
    return rng.choice((body, box(body), box(body) + body))


def test_no_string_makes_a_grader_raise_or_leave_its_range():
    rng = random.Random(0)
    strings = [hostile(rng) for _ in range(400)] + [box(c * n) for c in "[(1,\u0301ﷺ" for n in (MAX_CONTENT, 100_000)]
    strings += ["[" * 100_000, "<|begin_of_box|>" * 10_000, box("[" * 250 + "]" * 250), box("(1,2)" * 100)]
    for name, (rule, gold) in RULES.items():
        verify = boxed(rule)
        for answer in strings:
            start = time.perf_counter()
            grade = verify(answer, gold)
            assert time.perf_counter() - start < 1.0, (name, answer[:60])
            assert 0.0 <= grade.reward <= 1.0 and grade.reward == verify(answer, gold).reward
            assert grade.correct <= (grade.components["format"] == 1.0)
            json.dumps(grade.components)


# --- the runner -------------------------------------------------------------------------------------------------------


def test_a_failing_grader_is_data(caplog):
    def broken(answer, sample):
        if sample.answer == "boom":
            raise ZeroDivisionError("no")
        return boxed(text.exact)(answer, sample)

    samples = [sample("red"), sample("boom"), sample("red")]
    grades = score(samples, [box("red")] * 3, {"s": broken})
    assert [g.reward for g in grades] == [1.0, 0.0, 1.0]
    assert grades[1].flags == ("error",) and not grades[1].correct
    assert "s/0" in caplog.text and "ZeroDivisionError" in caplog.text


def test_rewards_out_of_range_are_failures():
    too_much = lambda answer, sample: boxed(text.exact)(answer, sample).__class__(7.0, True, {})  # noqa: E731
    not_a_number = lambda answer, sample: boxed(text.exact)(answer, sample).__class__(float("nan"), True, {})  # noqa: E731
    for verifier, flag in ((too_much, "error"), (not_a_number, "nan")):
        assert score([sample("red")], ["x"], {"s": verifier})[0].flags == (flag,)


def test_a_source_without_a_verifier_stops_at_once():
    with pytest.raises(UserError, match="no verifier for data source 's'; known: other"):
        score([sample("red")], ["x"], {"other": boxed(text.exact)})
    with pytest.raises(ValueError, match="2 answers"):
        score([sample("red")], ["x", "y"], {"s": boxed(text.exact)})
