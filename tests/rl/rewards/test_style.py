"""Penalties for how answers are written, on texts that deserve them and on texts that look as if."""

from __future__ import annotations

import pytest

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.style import repeated, style, writing
from glmv_jax.rl.task import box

EN = Sample("s/0", "s", (), "What does the sign say?", "stop")
ZH = Sample("s/1", "s", (), "图中有几只猫？请说明理由。", "3")
QUOTED = Sample("s/2", "s", (), "Read the sign.", "出口")
BARE = Sample("s/3", "s", (), "1 + 1 = ?", "2")
PROSE = (
    "The picture shows a street corner in the rain. A red sign hangs above the door of a bakery, and two people wait "
    "below it with one umbrella between them. The letters are white and somewhat worn, but they can be read."
)


def test_writings_of_letters():
    letters = {"a": "latin", "é": "latin", "猫": "han", "は": "kana", "カ": "kana", "한": "hangul", "ж": "cyrillic",
               "α": "greek", "ع": "arabic", "3": "", "٣": "", ",": "", "\ud800": "", " ": ""}  # fmt: skip
    assert {letter: writing(letter) for letter in letters} == letters


@pytest.mark.parametrize(("text", "sample", "mixes"), [
    (PROSE, EN, False), (PROSE + " 红色的标志。", EN, False),  # 5 letters of 160
    (PROSE + " 这是一个红色的标志，上面写着停车，两个人在下面等。", EN, True),
    ("Это знак stop.", EN, True), ("Es heißt Größe, à côté.", EN, False),
    ("这是红色的", EN, True),
    ("It says `出口出口出口` here", EN, False), ("So it is " + box("出口出口出口"), EN, False),
    ("It says 出口出口出口", QUOTED, False), ("It says выход", QUOTED, True),
    ("图中有三只猫。", ZH, False), ("图中有三只猫，使用 YOLO 检测。", ZH, False),
    ("There are three cats in the picture.", ZH, True), ("猫が三匹います。", ZH, True),
    ("图中有三只 cats，因为 we can see them clearly in the picture", ZH, True),
    ("$x = \\\\frac{1}{2}$ 所以 x 是一半", ZH, False), ("答案是二", BARE, False), ("It is two.", BARE, False),
    ("", EN, False), ("123 !?", ZH, False),
])  # fmt: skip
def test_mixed_languages(text, sample, mixes):
    found = style(text, sample, repetition=None)
    assert found.flags == ("mixed_language",) * mixes and found.reward == float(not mixes) == found.components["style"]
    assert style(text, sample, repetition=None, mixed=None).correct


@pytest.mark.parametrize(("text", "repeats"), [
    (PROSE, False), ("", False), ("no no no", False), ("ha " * 7, False),
    ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12", False),
    ("the same thing again and again " * 10, True), ("ha " * 40, True), ("再来一次" * 10, True), (PROSE * 2, True),
    (PROSE + " " + "I see a cat. " * 30, True), ("." * 200, True), ("|---" * 10 + "|", True),
])  # fmt: skip
def test_repetition(text, repeats):
    assert style(text, EN, mixed=None).flags == ("repetition",) * repeats


def test_repetition_by_its_definition():
    text = "a b c d a b c d a b"
    seen, repeats = set(), 0
    for i in range(10 - 3 + 1):
        span = tuple(text.split()[i : i + 3])
        repeats += span in seen
        seen.add(span)
    assert repeated(text, 3) == repeats / 8 == 0.5 and repeated("a b", 3) == 0.0


def test_boxes():
    for text, has in (("no", False), (box("x"), True), ("<|begin_of_box|>", True), ("x<|end_of_box|>", True)):
        assert style(text, EN, box=False).flags == ("unexpected_box",) * has
        assert style(text, EN, box=True).flags == ("no_box",) * (not has)
        assert style(text, EN).correct


def test_it_is_linear_and_raises_at_nothing():
    pieces = ("`", "$", "```", "<", "<|begin_of_box|>", "\ud800", "http://", "\\", "猫a", "$`", "<a ")
    for text in (piece * (30_000 // len(piece)) for piece in pieces):
        assert style(text, EN).reward in (0.0, 1.0)
