"""Image sources of stage 1 and plain texts: deterministic, disjoint between splits, true where that can be checked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from glmv_jax.data import charts, documents, emoji, images, photos, texts
from glmv_jax.data.seeds import generator
from glmv_jax.typing import UserError

SPLITS = ("train", "heldout")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", list(images.KINDS))
def test_images_are_deterministic(kind, split):
    first, second = images.Images(kind, split, 5), images.Images(kind, split, 5)
    for i in range(30):
        (id_a, a), (id_b, b) = first[i], second[i]
        assert id_a == id_b == f"{kind}/{split}/{i}" and a.tobytes() == b.tobytes()
        assert a.size == (64, 64) and a.mode == "RGB"
        assert np.asarray(a).std() > 1, "an empty picture"
    pictures = {split: {images.Images(kind, split)[i][1].tobytes() for i in range(60)} for split in SPLITS}
    assert not pictures["train"] & pictures["heldout"] and len(pictures["train"]) == 60


def test_photographs_are_held_out_whole():
    files = {split: {f for (_, s), names in photos.FILES.items() if s == split for f in names} for split in SPLITS}
    assert not files["train"] & files["heldout"]
    for name in files["train"] | files["heldout"]:
        assert max(photos.load(name).size) <= 512 and photos.load(name).mode == "RGB"


def test_photographs_are_those_of_scikit_image():
    data = pytest.importorskip("skimage.data")
    for name, photo in {"astronaut.png": data.astronaut(), "coffee.png": data.coffee()}.items():
        assert np.abs(np.asarray(photos.load(name), np.float64).mean((0, 1)) - photo.mean((0, 1))).max() < 1


def test_crops_and_their_mistakes():
    crops = photos.Crops("train", kind="scientific")
    assert crops[3].tobytes() == photos.Crops("train", kind="scientific")[3].tobytes() != crops[4].tobytes()
    with pytest.raises(UserError, match="natural/train"):
        photos.Crops("train", kind="medical")
    with pytest.raises(UserError, match="scientific"):
        images.Images("natural", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_pie_shares_by_area(split):
    """The data that `draw` returns is what the picture shows: slices have the area of their share."""
    checked = 0
    for i in itertools.count():
        picture, kind, shares = charts.draw(generator(0, "pie", split, i), split, (128, 128))
        if kind != "pie":
            continue
        pixels = np.asarray(picture).reshape(-1, 3)
        values, counts = np.unique(pixels, axis=0, return_counts=True)
        paper = np.asarray(picture)[0, 0]
        slices = sorted(c for v, c in zip(values, counts) if (v != paper).any() and (v != 255).any())[-len(shares) :]
        assert np.abs(np.array(slices) / sum(slices) - sorted(shares)).max() < 0.05, (split, i)
        checked += 1
        if checked == 10:
            return


def test_charts_and_documents_are_of_all_kinds():
    assert {charts.draw(generator(0, i), "train")[1] for i in range(40)} == {"bar", "line", "pie", "scatter"}
    for draw in (documents.page, documents.panel):
        picture = np.asarray(draw(generator(0, "x"), "heldout", (96, 64)))
        assert picture.shape == (64, 96, 3) and (picture != picture[-1, -1]).any(-1).mean() > 0.05


NUMERALS = dict(zip("零一二三四五六七八九", range(10)))


def read_chinese(text: str) -> int:
    """The value of a Chinese numeral below 100, digit by digit."""
    tens, ten, ones = text.partition("十")
    if not ten:
        return NUMERALS[tens]
    return 10 * (NUMERALS[tens] if tens else 1) + (NUMERALS[ones] if ones else 0)


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_true(split):
    names = {lang: {e.name(lang): e for e in emoji.load()} for lang in emoji.LANGUAGES}
    allowed = {emoji.load()[i].index for i in emoji.split(split)}
    source, again, sums = texts.Texts(split, 2), texts.Texts(split, 2), 0
    for i in range(300):
        sample = source[i]
        assert sample == again[i] and sample.images == () and sample.prompt == "" and not sample.boxed
        text = sample.answer
        if " = " in text and text[0].isdigit():
            first, operator, second, _, result = text.split(" ")
            assert int(first) + int(second) * (1 if operator == "+" else -1) == int(result)
            sums += 1
        elif "等于" in text:
            left, result = text.split("等于")
            first, second = left.replace("减", "加").split("加")
            sign = 1 if "加" in left else -1
            assert read_chinese(first) + sign * read_chinese(second) == read_chinese(result)
            sums += 1
        elif " = " in text:
            en, zh = sorted(text.split(" = "), key=lambda part: part in names["zh"])
            assert names["en"][en] is names["zh"][zh] and names["en"][en].index in allowed
    assert sums == 100


def test_held_out_words_and_sums_stay_out():
    train, held = ({texts.Texts(split)[i].answer for i in range(2000)} for split in SPLITS)
    assert not train & held
    unseen = [emoji.load()[i].name("zh") for i in emoji.split("heldout")]
    starts = {text.split("：")[0] for text in train if "：" in text}
    assert len(starts) > 100 and not starts & set(unseen)
