"""Films: what the answers say against the pixels, the measures of time and of tracks against counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from glmv_jax.data import coordinates, drawing
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.records import Sample
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.rl import tasks
from glmv_jax.rl.tasks import event, track


def samples(name: str, count: int, split: str):
    source = tasks.get(name).source(split, 5)
    return [source[i] for i in range(count)]


def pixels_of(image, colour: str, split: str) -> np.ndarray:
    """Where an image has a shade of a colour."""
    shades = getattr(drawing.COLOURS[colour], split)
    pixels = np.asarray(image)
    return np.any([(pixels == shade).all(-1) for shade in shades], axis=0)


def colour_in(text: str, lang: str) -> str:
    return next(name for name, colour in drawing.COLOURS.items() if colour.names[lang] in text)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_events_are_when_the_pixels_change(split):
    forms = set()
    for sample in samples("event", 80, split):
        form, lang = sample.meta["form"], sample.meta["lang"]
        forms.add(form)
        if form == "turn":
            at = sample.times.index(float(sample.answer))
            assert sample.images[at - 1].tobytes() != sample.images[at].tobytes()
            continue
        colour = colour_in(sample.answer if form == "which" else sample.prompt, lang)
        seen = [t for t, image in zip(sample.times, sample.images) if pixels_of(image, colour, split).any()]
        if form == "which":
            assert f"{seen[0]:.1f}" in sample.prompt
        elif form == "span":
            assert sample.answer == f"[[{seen[0]:.1f},{seen[-1]:.1f}]]" and seen[-1] < sample.times[-1]
        else:
            moment = float(sample.answer)
            assert seen == [t for t in sample.times if (t >= moment) == (form == "come")]
    assert forms == set(event.PROMPTS)


def test_the_overlap_of_spans_is_that_of_their_frames():
    spans = [(a, b) for a in range(6) for b in range(a, 6)]
    for (a, b), (c, d) in itertools.product(spans, repeat=2):
        one, two = set(range(a, b + 1)), set(range(c, d + 1))
        expected = len(one & two) / len(one | two)
        if expected == 0:
            assert event.overlap((a / 2, b / 2), (c / 2, d / 2), 0.5) == 0
        else:
            assert event.overlap((a / 2, b / 2), (c / 2, d / 2), 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("content", ["[[2.0,1.0]]", "[[1,2],[3,4]]", "1", "[[1,2]] or", "[[-1,2]]", "[[1e1,20]]", ""])
def test_what_is_no_span(content):
    assert event.span(content) is None


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_tracks_are_where_the_pixels_are(split):
    absent = 0
    for sample in samples("track", 40, split):
        gold = track.parse(sample.answer)
        for second, image in enumerate(sample.images):
            y, x = np.nonzero(pixels_of(image, colour_in(sample.prompt, sample.meta["lang"]), split))
            if second not in gold:
                absent += 1
                assert len(x) == 0
                continue
            found = coordinates.encode_box((x.min(), y.min(), x.max() + 1, y.max() + 1), *image.size)
            # The points of a star are smoothed: its own shade begins up to three pixels inside.
            assert np.abs(np.subtract(found, gold[second])).max() <= 1000 * 3 / min(image.size)
    assert absent


def test_the_measure_of_tracks_is_that_of_counted_cells():
    """Random tracks on a lattice of 20 x 20 cells of 50, so that IoU can be counted."""
    rng = np.random.default_rng(0)
    cells = lambda box: {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}  # noqa: E731
    rule = track.tracks(threshold=0.5, graded=0.25)
    for _ in range(60):
        made = []
        for _ in range(2):
            corners = np.sort(rng.integers(0, 20, (5, 2, 2)), axis=1)
            corners[:, 1] += 1
            made.append({s: tuple(corners[s].reshape(-1).tolist()) for s in rng.permutation(5)[: rng.integers(1, 5)]})
        iou = []
        for second in range(5):
            one, two = (cells(t[second]) if second in t else set() for t in made)
            if one or two:
                iou.append(len(one & two) / len(one | two))
        expected = 0.25 * np.mean(iou) + 0.75 * np.mean([i >= 0.5 for i in iou])
        said = [",".join(f"{s}:[[{','.join(str(50 * v) for v in box)}]]" for s, box in t.items()) for t in made]
        sample = Sample("", "track", (), "", said[1])
        score = rule(said[0], sample)
        assert score.value == pytest.approx(expected) and score.correct == all(i >= 0.5 for i in iou)


@pytest.mark.parametrize("content", [
    "0:[[1,2,3,4]] and 1:[[1,2,3,4]]", "0:[[1,2,3,4]],0:[[1,2,3,4]]", "[[1,2,3,4]]", "0:[[1,2,3]]", "0:[[1,2,3,1001]]",
    "0:[[1,2,3,4]]," * 2, ",".join(f"{n}:[[1,2,3,4]]" for n in range(65)), "",
])  # fmt: skip
def test_what_is_no_track(content):
    assert track.parse(content) is None


def test_tracks_are_read_as_they_may_be_written():
    assert track.parse("{0: [[5,2,3,9]], \n1:[1,2,3,4]}") == {0: (3, 2, 5, 9), 1: (1, 2, 3, 4)}


def test_frames_are_told_with_their_times():
    tokenizer = Tokenizer()
    builder = DocumentBuilder(tokenizer, Patcher(max_patches=144), 400, 900)
    (sample,) = samples("event", 1, "train")
    for document in (builder.prompt(sample), builder.pretrain(sample)):
        text = tokenizer.decode(document.tokens, keep_special=True)
        places = [text.index(f"<|end_of_image|>{seconds:.1f} seconds") for seconds in sample.times]
        assert places == sorted(places) and text.count("<|begin_of_image|>") == len(sample.times)
        assert places[-1] < text.index(sample.prompt)
