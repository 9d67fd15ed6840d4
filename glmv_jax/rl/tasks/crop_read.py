"""Reading a label that only a crop can show: "What is written under the cat?" of a large picture seen as a small one.

The large picture, SIDE pixels a side, has two or three things, each with a label of its own under it. The sample shows
it at 1 / SHRINK of its size in few levels of brightness, where the things are told apart and a label is one or two
pixels high. `full` draws the large picture again from the sample's facts, `crop` is what a tool shows of it; the
environment that offers the tool calls these two. A crop of a label is legible at its own size, about 40 x 20 pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import coordinates, drawing, emoji, fonts
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.rewards.grade import Score
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks import visual

SIDE, SHRINK, LEVELS = 384, 8, 8
THING, LETTERS = 104, 14  # pixels: the side of a thing, the height of a label's face
SMALLEST = 8  # pixels: the side of a crop
PROMPTS = {
    "en": "What is written under the {}? Crop to read.",
    "zh": "{}下面写了什么？裁剪后再读。",
}


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, number = scene.language(rng), int(rng.integers(2, 4))
    things = scene.distinct(rng, scene.OBJECTS, number)
    labels: list[str] = []
    while len(labels) < number:
        label = _label(rng, split)
        labels += [label] if label not in labels else []
    corners = scene.place(rng, split, (SIDE, SIDE), [(THING, THING + LETTERS + 8)] * number)
    while corners is None:
        corners = scene.place(rng, split, (SIDE, SIDE), [(THING, THING + LETTERS + 8)] * number)
    facts: dict[str, Any] = {
        "things": [{"noun": noun, "label": label, "corner": list(corner)}
                   for noun, label, corner in zip(things, labels, corners)],
        "paper": list(drawing.background(split, rng)),
        "face": fonts.face_name(split, "en", rng),
    }  # fmt: skip
    facts["boxes"] = [list(coordinates.encode_box(label_box(facts["things"][0], facts["face"]), SIDE, SIDE))]
    facts["choices"] = labels
    called = emoji.load()[emoji.find(things[0])].name(lang)
    prompt = PROMPTS[lang].format(called)
    return scene.sample("crop_read", overview(draw(facts)), prompt, labels[0], lang, "text", **facts)


def _label(rng: np.random.Generator, split: str) -> str:
    """Four or five symbols that belong to the split."""
    while True:
        drawn = rng.integers(len(read.ALPHABET), size=int(rng.integers(4, 6)))
        label = "".join(read.ALPHABET[i] for i in drawn)
        if read.belongs(label, split):
            return label


def label_box(thing: dict, face: str) -> tuple[int, int, int, int]:
    """Where the label of a thing is, in pixels of the large picture."""
    x, y = thing["corner"]
    left, top, right, bottom = fonts.load(face, LETTERS).getbbox(thing["label"])
    x, y = x + (THING - (right - left)) // 2, y + THING + 4
    return x, y, x + right - left, y + bottom - top


def draw(facts: dict) -> Image.Image:
    """The large picture."""
    picture = Image.new("RGB", (SIDE, SIDE), tuple(facts["paper"]))
    pen, font = ImageDraw.Draw(picture), fonts.load(facts["face"], LETTERS)
    for thing in facts["things"]:
        stamp = emoji.stamp(emoji.find(thing["noun"]), THING)
        x, y = thing["corner"]
        emoji.paste(picture, stamp, x + (THING - stamp.width) // 2, y + (THING - stamp.height) // 2)
        left, top, *_ = font.getbbox(thing["label"])
        x, y, *_ = label_box(thing, facts["face"])
        pen.text((x - left, y - top), thing["label"], font=font, fill=(20, 20, 20))
    return picture


def overview(large: Image.Image) -> Image.Image:
    """The large picture as it is first seen."""
    small = np.asarray(large.resize((SIDE // SHRINK, SIDE // SHRINK), Image.Resampling.BOX), np.int32)
    return Image.fromarray((((small * LEVELS) // 256) * 255 // (LEVELS - 1)).astype(np.uint8))


def full(sample: Sample) -> Image.Image:
    """The large picture of a sample."""
    return draw(sample.meta)


def crop(sample: Sample, box: Sequence[float], most: int = 64) -> Image.Image:
    """The part of the large picture in a box of 0..999, at its own size, or shrunk to `most` pixels on the longer side.

    A box is made at least SMALLEST pixels wide and high, and kept inside the picture.
    """
    left, top, right, bottom = (min(max(round(v), 0), SIDE) for v in coordinates.decode_box(box, SIDE, SIDE))
    left, top = min(left, SIDE - SMALLEST), min(top, SIDE - SMALLEST)
    part = full(sample).crop((left, top, max(right, left + SMALLEST), max(bottom, top + SMALLEST)))
    scale = min(1.0, most / max(part.size))
    size = max(1, round(part.width * scale)), max(1, round(part.height * scale))
    return part if scale == 1.0 else part.resize(size, Image.Resampling.BOX)


def label(content: str, sample: Sample) -> Score:
    """Right when the text is equal; else half its similarity, so that no mixture of labels is worth it."""
    score = text.reading(content, sample)
    return score if score.correct else Score(score.value / 2, False)


def hacks(sample: Sample) -> list[str]:
    """The other labels, all labels at once, the alphabet, and those of reading."""
    others = sample.meta["choices"][1:]
    return [read.ALPHABET, " ".join(sample.meta["choices"]), "".join(sample.meta["choices"]), *visual.misread(sample),
            *others]  # fmt: skip


TASKS = (Task("crop_read", boxed(label), hacks, make=generate, levels=levels.by_number("things", 3)),)


class Whole:
    """The task's samples with their large pictures, for an environment that cuts its crops out of what it was given.

    There the first look is small only where the encoder's budget makes it so.
    """

    def __init__(self, split: str = "train", seed: int = 0):
        self._samples = TASKS[0].source(split, seed)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> Sample:
        sample = self._samples[i]
        return dataclasses.replace(sample, images=(full(sample),))
