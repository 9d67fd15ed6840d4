"""Answers of the visual questions, found again from the pixels by code that shares nothing with the generators.

Shapes, colours, boxes and bars are read back with scipy, emoji by nearest picture, strings by their number of letters.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import ndimage

from glmv_jax.data import coordinates, emoji
from glmv_jax.data.questions import DESCRIPTIONS, KINDS, Questions, name, scene
from glmv_jax.typing import UserError
from tests.data import scenes

SHAPES = {
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "heart": "心形", "cross": "十字形",
}  # fmt: skip
COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色", "black": "黑色",
}  # fmt: skip
SPLITS = ("train", "heldout")


def draw(kind: str, split: str, n: int = 120) -> list:
    source = Questions([kind], split, seed=11)
    return [source[i] for i in range(n)]


def with_shapes(kind: str, split: str, n: int = 120) -> list:
    """Samples whose prompt or caption is about shapes, not emoji."""
    return [s for s in draw(kind, split, n) if mentioned(s.prompt + s.answer, SHAPES)]


def turns(sample) -> list[tuple[str, str]]:
    """All the questions that are asked about the picture, with their answers."""
    return [(sample.prompt, sample.answer), *sample.more]


def mentioned(text: str, names: dict[str, str]) -> list[str]:
    """Keys of the names that the text mentions in either language, in the order of the text."""
    text = text.replace("crosses", "cross")
    places = {en: max(text.find(en), text.find(zh)) for en, zh in names.items()}
    return sorted((en for en, place in places.items() if place >= 0), key=places.get)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_deterministic_small_and_complete(kind, split):
    samples, again = draw(kind, split, 60), draw(kind, split, 60)
    for i, (a, b) in enumerate(zip(samples, again)):
        assert (a.id, a.prompt, a.answer, a.meta) == (b.id, b.prompt, b.answer, b.meta)
        assert a.images[0].tobytes() == b.images[0].tobytes()
        assert a.id == f"{kind}/{split}/{i}" and a.source == kind and a.boxed == (kind not in DESCRIPTIONS)
        assert bool(a.prompt) == (kind != "caption") and a.answer and a.meta["lang"] in ("en", "zh")
        width, height = a.images[0].size
        assert width % 16 == height % 16 == 0 and width * height <= 64 * 64 and a.images[0].mode == "RGB"
        assert a.meta["check"] in ("exact", "numeric", "box", "point", "text")
    assert len({s.images[0].tobytes() for s in samples}) == 60
    assert {s.meta["lang"] for s in samples} == {"en", "zh"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_splits_and_seeds_never_meet(kind):
    train, held = ({s.images[0].tobytes() for s in draw(kind, split)} for split in SPLITS)
    assert not train & held
    asked = [[(s.prompt, s.answer, s.images[0].size) for s in draw(kind, split)] for split in SPLITS]
    assert sum(a == b for a, b in zip(*asked)) < 12  # not the same draws in another dress
    corners = [{s.images[0].getpixel((0, 0)) for s in draw(kind, split)} for split in SPLITS]
    assert not corners[0] & corners[1]  # backgrounds
    assert Questions([kind], "train", 1)[0].images[0].tobytes() != Questions([kind], "train", 2)[0].images[0].tobytes()


@pytest.mark.parametrize("split", SPLITS)
def test_count(split):
    samples = with_shapes("count", split)
    assert len(samples) > 50 and {s.answer for s in samples} == set("12345")
    for s in samples:
        shapes = [found.shape for found in scenes.find(s.images[0])]
        for prompt, answer in turns(s):
            (asked,) = mentioned(prompt, SHAPES)
            assert str(shapes.count(asked)) == answer, s.id
    assert any(s.more for s in samples)


@pytest.mark.parametrize("split", SPLITS)
def test_attribute(split):
    for s in draw("attribute", split):
        found = scenes.find(s.images[0])
        assert len(turns(s)) == len(set(turns(s))) == len(found)
        for prompt, answer in turns(s):
            (asked,) = mentioned(prompt, SHAPES) or mentioned(prompt, COLOURS)
            if asked in SHAPES:
                (right,) = [f.colour for f in found if f.shape == asked]
            else:
                (right,) = [f.shape for f in found if f.colour == asked]
            gold = mentioned(answer, COLOURS if asked in SHAPES else SHAPES)
            assert gold == [right], s.id
            assert answer.isascii() == (s.meta["lang"] == "en")


@pytest.mark.parametrize("split", SPLITS)
def test_spatial(split):
    samples = with_shapes("spatial", split)
    assert len({s.answer for s in samples}) == 8
    for s in samples:
        boxes = {f.shape: f.centre for f in scenes.find(s.images[0])}
        for prompt, answer in turns(s):
            # "Which side of the B is the A?" names the reference first; all other forms name the object first.
            names = mentioned(prompt, SHAPES)
            a, b = reversed(names) if prompt.startswith("Which side") else names
            dx, dy = boxes[a][0] - boxes[b][0], boxes[a][1] - boxes[b][1]
            sideways = abs(dx) > abs(dy)
            across, along = ("left 左边", "right 右边")[dx > 0], ("above 上面", "below 下面")[dy > 0]
            assert answer in (across if sideways else along).split(), s.id
            assert max(abs(dx), abs(dy)) > 1.7 * min(abs(dx), abs(dy)), "too close to the diagonal to answer"


@pytest.mark.parametrize("split", SPLITS)
def test_ground_and_point(split):
    for s in with_shapes("ground", split):
        width, height = s.images[0].size
        for prompt, answer in turns(s):
            (asked,) = mentioned(prompt, SHAPES)
            (found,) = [f.box for f in scenes.find(s.images[0]) if f.shape == asked]
            (box,) = coordinates.parse_boxes(answer)
            # One pixel: the tip of a star or triangle may be too faint to see.
            assert np.abs(np.array(coordinates.decode_box(box, width, height)) - found).max() <= 1.05, s.id
    for s in with_shapes("point", split):
        width, height = s.images[0].size
        assert coordinates.inside(coordinates.parse_points(s.answer)[0], s.meta["boxes"][0])
        for prompt, answer in turns(s):
            (asked,) = mentioned(prompt, SHAPES)
            (found,) = [f for f in scenes.find(s.images[0]) if f.shape == asked]
            (point,) = coordinates.parse_points(answer)
            assert np.abs(np.array(coordinates.decode_point(point, width, height)) - found.centre).max() <= 1.05, s.id


@pytest.mark.parametrize("split", SPLITS)
def test_ground_one_emoji(split):
    """The box of a lone emoji is the extent of what is not background."""
    checked = 0
    for s in draw("ground", split, 800):
        ink = scenes.foreground(s.images[0], 12)
        count = ndimage.label(ink, np.ones((3, 3)))[1]
        if mentioned(s.prompt, SHAPES) or count != 1:
            continue
        rows, columns = np.nonzero(ink.any(1))[0], np.nonzero(ink.any(0))[0]
        extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        box = coordinates.decode_box(s.meta["boxes"][0], *s.images[0].size)
        assert np.abs(np.array(box) - extent).max() <= 2.05, s.id
        checked += 1
    assert checked > 20


def bar_values(picture) -> list[int]:
    """Heights of the bars in grid units, left to right, from the pixels."""
    pixels = np.asarray(picture, np.int32)
    paper = pixels[0, 0]
    lines = np.nonzero((pixels[:, -1] != paper).any(-1))[0]
    unit, floor = np.diff(lines).mean(), lines[-1]
    # Grid and axis are grey; just above the axis only bars are left of colour, or black.
    row = pixels[floor - 1]
    bar = np.abs(row - paper).sum(-1) > 60
    bar[:10] = False
    starts, ends = np.nonzero(np.diff(bar.astype(int)) == 1)[0] + 1, np.nonzero(np.diff(bar.astype(int)) == -1)[0] + 1
    values = []
    for start, end in zip(starts, ends):
        middle = (start + end) // 2
        same = np.abs(pixels[:floor, middle] - row[middle]).sum(-1) == 0
        values.append(round(same.sum() / unit))
    return values


@pytest.mark.parametrize("split", SPLITS)
def test_chart(split):
    for s in draw("chart", split):
        values = dict(zip("ABC", bar_values(s.images[0])))
        assert len(turns(s)) == len(values) + 2
        for prompt, answer in turns(s):
            label = re.search(r"\b([A-C])\b|^([A-C])", prompt)
            if label:
                assert str(values[label.group(1) or label.group(2)]) == answer, s.id
            elif re.search("hortest|最低", prompt):
                assert answer == min(values, key=values.get), s.id
            else:
                assert re.search("allest|最高", prompt) and answer == max(values, key=values.get), s.id
        assert sorted(values.values()) == sorted(set(values.values()))


@pytest.mark.parametrize("split", SPLITS)
def test_table(split):
    for s in draw("table", split):
        values = bar_values(s.images[0])
        assert s.answer == ",".join(f"{label}={value}" for label, value in zip("ABC", values)), s.id


@pytest.mark.parametrize("split", SPLITS)
def test_describe(split):
    """Colour, shape and centre of every object, from left to right."""
    placed = plain = 0
    for s in draw("describe", split, 200):
        parts = re.findall(r"([^\[\],]+)(?:\[\[(\d+,\d+)\]\])?", s.answer)
        if not all(mentioned(said, SHAPES) for said, _ in parts):
            continue
        seen = sorted(scenes.find(s.images[0]), key=lambda found: found.centre)
        assert len(seen) == len(parts), s.id
        for found, (said, centre) in zip(seen, parts):
            assert mentioned(said, SHAPES) == [found.shape] and mentioned(said, COLOURS) == [found.colour], s.id
            if centre:
                point = coordinates.decode_point([int(v) for v in centre.split(",")], *s.images[0].size)
                assert np.abs(np.array(point) - found.centre).max() <= 1.05, s.id
        placed, plain = placed + bool(parts[0][1]), plain + (not parts[0][1])
    assert min(placed, plain) > 15


@pytest.mark.parametrize("split", SPLITS)
def test_caption(split):
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "一个": 1, "两个": 2, "三个": 3}
    checked = 0
    for s in with_shapes("caption", split):
        counted = {}
        for found in scenes.find(s.images[0]):
            counted[found.shape, found.colour] = counted.get((found.shape, found.colour), 0) + 1
        said = {}
        for part in re.split(" and |和", s.answer):
            number = part.split(" ")[0] if s.meta["lang"] == "en" else part[:2]
            said[mentioned(part, SHAPES)[0], mentioned(part, COLOURS)[0]] = numbers[number]
        assert said == counted, s.id
        assert list(said.values()) == sorted(said.values(), reverse=True), "one picture, one caption"
        checked += 1
    assert checked > 30


@pytest.mark.parametrize("split", SPLITS)
def test_name(split):
    """The emoji nearest to the picture, among all that are asked about, bears the gold name."""
    train = {emoji.load()[i].concept for i in emoji.split("train")}
    gallery = {i: np.asarray(emoji.plain(i).resize((24, 24)), np.float64) for i in name.concepts()}
    right = 0
    samples = draw("name", split, 100)
    for s in samples:
        ink = scenes.foreground(s.images[0], 24)
        rows, columns = np.nonzero(ink.any(1))[0], np.nonzero(ink.any(0))[0]
        cut = np.array(s.images[0])
        cut[~ink] = 255
        margin = 2
        x1, y1, x2, y2 = columns[0] - margin, rows[0] - margin, columns[-1] + margin, rows[-1] + margin
        picture = emoji.Image.fromarray(np.pad(cut, ((4, 4), (4, 4), (0, 0)), constant_values=255))
        seen = np.asarray(picture.crop((x1 + 4, y1 + 4, x2 + 5, y2 + 5)).resize((24, 24)), np.float64)
        best = min(gallery, key=lambda i: np.abs(gallery[i] - seen).sum())
        right += emoji.load()[best].name(s.meta["lang"]) == s.answer
        wants_chinese = "Chinese" in s.prompt or "中文" in s.prompt
        assert wants_chinese == (s.meta["lang"] == "zh") and emoji.load()[s.meta["concept"]].concept in train
    assert right >= 97
    assert len(name.concepts()) > 50


def test_scene_objects_are_training_concepts():
    assert {emoji.find(noun) for noun in scene.OBJECTS} <= set(emoji.split("train"))


@pytest.mark.parametrize("split", SPLITS)
def test_read(split):
    """Nothing is cut off, and a Latin string has as many connected parts as letters (letters of some faces touch)."""
    equal = total = 0
    for s in draw("read", split):
        ink = scenes.foreground(s.images[0], 60)
        assert not (ink[0].any() or ink[-1].any() or ink[:, 0].any() or ink[:, -1].any()), s.id
        assert ink.any(1).sum() >= 8, "too small to read"
        if s.answer.isascii():
            assert re.fullmatch("[ACEHKLPTUXY23479]{1,3}", s.answer)
            equal, total = equal + (ndimage.label(ink, np.ones((3, 3)))[1] == len(s.answer)), total + 1
        else:
            assert len(s.answer) in (1, 2)
        assert split == "train" or len(s.answer) > 1
    assert equal > 0.6 * total


def test_strings_to_read_belong_to_one_split():
    train, held = ({s.answer for s in draw("read", split, 1500) if len(s.answer) > 1} for split in SPLITS)
    assert len(train) > 500 and not train & held


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'count'"):
        Questions(["cuont"], "train")
    with pytest.raises(UserError, match="train, heldout"):
        Questions(["count"], "test")
    with pytest.raises(UserError, match="no question kinds"):
        Questions([], "train")
