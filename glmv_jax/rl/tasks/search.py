"""Visual search: the one object of a colour and shape among a dozen that share its colour or its shape.

Meant for 96 x 64 pixels (96 patches of 8), objects of 8 to 10 pixels; or what is asked is the shape of the only object
of a colour. The answer is a point, or a name.
"""

from __future__ import annotations

import numpy as np

from glmv_jax.data import coordinates, drawing
from glmv_jax.data.questions import attribute, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import Grade, boxed, geometry, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import choices, scattered

CANVAS = (96, 64)
POINT = {
    "en": ("Find the {}. Point.", "Point at the {}."),
    "zh": ("找出{}。给出点。", "指出{}。"),
}
SHAPE = {"en": ("What is the one {} thing?",), "zh": ("唯一{}的是什么形状？",)}


def generate(rng: np.random.Generator, split: str) -> Sample:
    """Two kinds that share nothing are scattered; the target has the shape of one and the colour of the other, or alone
    its colour."""
    lang, count = scene.language(rng), int(rng.integers(10, 15))
    shapes, colours = (scene.distinct(rng, tuple(table), 3) for table in (drawing.SHAPES, drawing.COLOURS))
    if rng.random() < 0.7:
        target, forms = (shapes[0], colours[1]), POINT[lang]
    else:
        target, forms = (shapes[0], colours[2]), SHAPE[lang]
    others = [((shapes[0], colours[0]), (shapes[1], colours[1]))[k % 2] for k in range(count)]
    things = scene.scatter(rng, split, CANVAS, [target, *others], (8, 10))
    picture, box = scene.paint(CANVAS, things, split, rng), scene.written_box(things[0], CANVAS)
    if forms is POINT[lang]:
        prompt = scene.choose(rng, forms).format(things[0].phrase(lang))
        answer = coordinates.format_lists([coordinates.encode_point(things[0].centre, *CANVAS)])
        return scene.sample("search", picture, prompt, answer, lang, "point", boxes=[box],
                            others=[scene.written_box(t, CANVAS) for t in things[1:]])  # fmt: skip
    prompt = scene.choose(rng, forms).format(drawing.COLOURS[target[1]].names[lang])
    name = things[0].name(lang)
    facts = {"aliases": attribute.aliases(name), "choices": [names[lang] for names in drawing.SHAPES.values()]}
    return scene.sample("search", picture, prompt, name, lang, "exact", boxes=[box], **facts)


_POINT, _NAME = boxed(geometry.point(reach=60.0, graded=0.3)), boxed(text.exact)


def verify(answer_text: str, sample: Sample) -> Grade:
    """By what the sample asks for."""
    return (_POINT if sample.meta["check"] == "point" else _NAME)(answer_text, sample)


def elsewhere(sample: Sample) -> list[str]:
    """All choices; or what cheats any pointing, another object, and the middles of all."""
    if sample.meta["check"] == "exact":
        return choices(sample)
    middles = [[(x1 + x2) // 2, (y1 + y2) // 2] for x1, y1, x2, y2 in sample.meta["others"]]
    singly = (coordinates.format_lists([middle]) for middle in middles[:4])
    return [*scattered(sample), coordinates.format_lists(middles), *singly]


TASKS = (Task("search", verify, elsewhere, make=generate, levels=levels.by_kind("check", "exact", "point")),)
