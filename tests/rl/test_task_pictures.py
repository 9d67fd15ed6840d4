"""Gold answers found again from the pixels and the prompt, by code that shares nothing with the generators.

Shapes are read back by `tests.data.scenes`; small squares are solved by trying every filling. Of what is written in
pictures (lines, pages, tables, numbers of figures) what was given to the pen is looked at: no reader here can read.
"""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from PIL import ImageDraw

from glmv_jax.data import coordinates
from glmv_jax.rl import tasks
from glmv_jax.rl.tasks import puzzle
from tests.data import scenes

SPLITS = ("train", "heldout")
SHAPES = {"circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "heart": "心形", "cross": "十字形"}
COLOURS = {"red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
           "pink": "粉色", "black": "黑色"}  # fmt: skip
SIDES = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}


def drawn(name: str, split: str, count: int) -> list:
    source = tasks.source(name, split, 5)
    return [source[i] for i in range(count)]


def mentioned(text: str, names: dict[str, str]) -> list[str]:
    """Keys of the names that the text has, in its order, each as often as it is there."""
    text = text.replace("crosses", "cross")
    found = sorted((m.start(), en) for en, zh in names.items() for m in re.finditer(rf"{en}|{zh}", text))
    return [en for _, en in found]


def side(a: scenes.Found, b: scenes.Found) -> str:
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    return ("left", "right")[dx > 0] if abs(dx) > abs(dy) else ("above", "below")[dy > 0]


def picked(prompt: str, found: list[scenes.Found]) -> scenes.Found:
    """The object that a phrase refers to."""
    shapes, english = mentioned(prompt, SHAPES), prompt.isascii()
    if words := re.search("leftmost|rightmost|topmost|lowest|largest|smallest|最[左右上下]|最大|最小", prompt):
        alike = [f for f in found if f.shape == shapes[0]]
        x, y, width = (lambda f: f.centre[0]), (lambda f: f.centre[1]), (lambda f: f.box[2] - f.box[0])
        how = {"leftmost": (min, x), "最左": (min, x), "rightmost": (max, x), "最右": (max, x), "topmost": (min, y),
               "最上": (min, y), "lowest": (max, y), "最下": (max, y), "largest": (max, width), "最大": (max, width),
               "smallest": (min, width), "最小": (min, width)}[words[0]]  # fmt: skip
        return how[0](alike, key=how[1])
    asked, anchor = shapes if english else reversed(shapes)
    (where,) = mentioned(prompt, SIDES)
    (beside,) = [f for f in found if f.shape == anchor]
    (one,) = [f for f in found if f.shape == asked and side(f, beside) == where]
    return one


@pytest.mark.parametrize("split", SPLITS)
def test_refer(split):
    checked = 0
    for s in drawn("refer", split, 80):
        if not mentioned(s.prompt, SHAPES):
            continue  # emoji
        (box,) = coordinates.parse_boxes(s.answer)
        meant = picked(s.prompt, scenes.find(s.images[0])).box
        assert np.abs(np.array(coordinates.decode_box(box, *s.images[0].size)) - meant).max() <= 1.05, s.id
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("split", SPLITS)
def test_hallucination(split):
    samples = drawn("hallucination", split, 300)
    for s in samples[:100]:
        found, colours, shapes = scenes.find(s.images[0]), mentioned(s.prompt, COLOURS), mentioned(s.prompt, SHAPES)
        wanted = list(zip(colours, shapes))
        alike = [f for f in found if (f.colour, f.shape) == wanted[0]]
        if len(wanted) == 2:
            (a,), (b,) = alike, [f for f in found if (f.colour, f.shape) == wanted[1]]
            right = [side(a, b)] == mentioned(s.prompt, SIDES)
        elif number := re.search(r"\d", s.prompt):
            right = len(alike) == int(number[0])
        else:
            right = bool(alike)
        assert s.answer == {"en": ("no", "yes"), "zh": ("否", "是")}[s.meta["lang"]][right], s.id
    for form in ("there", "number", "side"):  # balanced in each form: four deviations of a fair coin
        yes = [s.answer in ("yes", "是") for s in samples if s.meta["form"] == form]
        assert len(yes) > 40 and abs(np.mean(yes) - 0.5) < 2 / math.sqrt(len(yes))


@pytest.mark.parametrize("split", SPLITS)
def test_search(split):
    for s in drawn("search", split, 40):
        found, (colour,), shapes = scenes.find(s.images[0]), mentioned(s.prompt, COLOURS), mentioned(s.prompt, SHAPES)
        assert len(found) >= 11
        same = [f for f in found if f.colour == colour and (not shapes or f.shape == shapes[0])]
        assert len(same) == 1, s.id
        if shapes:
            point = coordinates.decode_point(coordinates.parse_points(s.answer)[0], *s.images[0].size)
            assert np.abs(np.array(point) - same[0].centre).max() <= 1.05, s.id
        else:
            assert mentioned(s.answer, SHAPES) == [same[0].shape], s.id


@pytest.mark.parametrize("split", SPLITS)
def test_difference(split):
    """Pixels that differ between the two pictures, and are no paper in the second, are those of the object."""
    ways = set()
    for s in drawn("difference", split, 40):
        before, after = (np.asarray(picture, np.int32) for picture in s.images)
        differs = np.abs(before - after).sum(-1) > 0
        there = differs & (np.abs(after - after[0, 0]).sum(-1) > 0)
        rows, columns = np.nonzero(there.any(1))[0], np.nonzero(there.any(0))[0]
        x1, y1, x2, y2 = coordinates.decode_box(s.meta["boxes"][0], *s.images[1].size)
        assert (
            x1 - 0.1 <= columns[0] and columns[-1] + 1 <= x2 + 0.1 and y1 - 0.1 <= rows[0] and rows[-1] + 1 <= y2 + 0.1
        )
        assert there.sum() >= 8 and coordinates.inside(coordinates.parse_points(s.answer)[0], s.meta["boxes"][0])
        ways.add(s.meta["change"])
    assert ways == {"colour", "shape", "place", "new"}


@pytest.mark.parametrize("split", SPLITS)
def test_instruction_about_a_picture(split):
    checked = 0
    for s in drawn("instruction", split, 60):
        if not s.images:
            continue
        found = sorted(scenes.find(s.images[0]), key=lambda f: f.centre)
        colours = s.prompt.startswith("Colours") or "颜色" in s.prompt
        names = [(f.colour if colours else f.shape) for f in found]
        assert mentioned(s.answer.lower(), COLOURS if colours else SHAPES) == names, s.id
        assert ("in capitals" in s.prompt) == (s.answer.isupper() and s.answer.isascii())
        (joint,) = re.search(r'joined by "(.)"|用"(.)"连接', s.prompt).group(1, 2)[s.meta["lang"] == "zh"]
        assert s.answer.count(joint) == len(found) - 1
        checked += 1
    assert checked > 15


def fillings() -> list[np.ndarray]:
    """All squares of four by four numbers with 1 to 4 once in every row, column and block."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    found = []
    for four in itertools.product(rows, repeat=2):
        if any(a == b for a, b in zip(*four)) or len({*four[0][:2], *four[1][:2]}) < 4:
            continue
        for rest in itertools.product(rows, repeat=2):
            square = np.array([*four, *rest])
            columns = all(len(set(column)) == 4 for column in square.T.tolist())
            if columns and all(len(set(square[2:, k : k + 2].ravel().tolist())) == 4 for k in (0, 2)):
                found.append(square)
    return found


def test_squares_have_one_answer():
    """Of all squares, those that agree with three numbers around a cell have one number in it."""
    squares = fillings()
    assert len(squares) == 288
    rng = np.random.default_rng(0)
    kinds = {puzzle.filled(rng).tobytes() for _ in range(200)}
    assert kinds <= {square.astype(int).tobytes() for square in squares} and len(kinds) > 60
    for _ in range(100):
        full = puzzle.filled(rng)
        shown, (row, column) = np.where(rng.random((4, 4)) < 0.45, 0, full), rng.integers(4, size=2)
        shown[row, column] = 0
        if len(puzzle.seen_from(shown, row, column)) == 3:
            fitting = [square for square in squares if ((shown == 0) | (shown == square)).all()]
            assert {int(square[row, column]) for square in fitting} == {int(full[row, column])}


@pytest.mark.parametrize("name", ["line", "document", "tabular", "formula", "geometry", "arithmetic", "puzzle"])
def test_what_is_written_can_be_read(name, monkeypatch):
    """Every text lies inside its picture and over no other, is large enough, and its face has all of its characters."""
    seen = []

    def write(pen, xy, text, *args, font, anchor=None, **options):
        seen.append((pen, pen.textbbox(xy, text, font=font, anchor=anchor), text, font))
        return draw(pen, xy, text, *args, font=font, anchor=anchor, **options)

    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    samples = drawn(name, "train", 60) + drawn(name, "heldout", 60)
    assert len(seen) >= (60 if name == "arithmetic" else 120)
    for pen, (left, top, right, bottom), text, font in seen:
        width, height = pen.im.size
        assert left >= -0.5 and top >= -0.5 and right <= width + 0.5 and bottom <= height + 0.5, text
        assert font.size >= 9
        missing = bytes(font.getmask("\uffff"))
        assert all(c == " " or bytes(font.getmask(c)) != missing for c in text), text
    for (pen, a, *_), (other, b, *_) in itertools.combinations(seen, 2):
        if pen is other:  # 1 pixel: boxes are rounded outwards
            assert a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1, (a, b)
    written = " ".join(text for _, _, text, _ in seen)
    if name in ("line", "document"):
        counted = {str(n) for n in range(10)}  # how many items there are is not written
        assert all(s.answer in written or s.answer in counted for s in samples)


def test_arithmetic_and_reasoning_are_right():
    for s in drawn("arithmetic", "train", 60):
        a, sign, b = re.fullmatch(r"(\d+)([-+x])(\d+)", s.meta["problem"]).groups()
        assert int(s.answer) == {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign]
    pytest.importorskip("reasoning_gym")
    checked = 0
    for s in drawn("reasoning", "train", 150):
        numbers = [int(n) for n in re.findall(r"\d+", s.prompt)]
        by_hand = {
            "basic_arithmetic": lambda: eval(re.fullmatch(r"Calculate ([-+*()\d ]+)\.", s.prompt)[1]),  # noqa: B023
            "chain_sum": lambda: eval(re.search(r": ([-+\d ]+) =", s.prompt)[1]),  # noqa: B023
            "gcd": lambda: math.gcd(*numbers),  # noqa: B023
            "lcm": lambda: math.lcm(*numbers),  # noqa: B023
            "count_bits": lambda: bin(numbers[-1]).count("1"),  # noqa: B023
            "products": lambda: math.prod(numbers),  # noqa: B023
        }.get(s.meta["data_set"])
        if by_hand:
            assert int(s.answer) == by_hand(), s.prompt
            checked += 1
    assert checked > 50
