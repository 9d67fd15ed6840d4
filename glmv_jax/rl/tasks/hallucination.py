"""Yes or no about what a picture holds: an object, a number of objects, a relation. Half of the answers are no.

Meant for the usual small canvases (48 x 48, 64 x 32 pixels), objects of 12 pixels and more. The answer is drawn first
and does not depend on the form of the question; what is not there is made of what is: a shape and a colour that both
occur, but not together (POPE's adversarial negatives, arXiv 2305.10355, section 3.3).
"""

from __future__ import annotations

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import count, scene, spatial
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import choices

ANSWERS = {"en": ("yes", "no"), "zh": ("是", "否")}
ALIASES = {"yes": ["y"], "no": ["n"], "是": ["是的", "有", "对"], "否": ["不是", "没有", "不对"]}
THERE = {"en": ("Is there a {}? Yes or no.", "Do you see a {}? Yes or no."), "zh": ("有{}吗？是或否。",)}
NUMBER = {"en": ("Are there {} {}? Yes or no.",), "zh": ("有{}个{}吗？是或否。",)}
SIDE = {
    "left": {"en": "Is the {} left of the {}? Yes or no.", "zh": "{}在{}左边吗？是或否。"},
    "right": {"en": "Is the {} right of the {}? Yes or no.", "zh": "{}在{}右边吗？是或否。"},
    "above": {"en": "Is the {} above the {}? Yes or no.", "zh": "{}在{}上面吗？是或否。"},
    "below": {"en": "Is the {} below the {}? Yes or no.", "zh": "{}在{}下面吗？是或否。"},
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
Asked = tuple[tuple[int, int], list[scene.Thing], str]  # canvas, things, question


def words(shape: str, colour: str, lang: str) -> str:
    """A colour and a shape: red circle, 红色圆形."""
    gap = " " if lang == "en" else ""
    return drawing.COLOURS[colour].names[lang] + gap + drawing.SHAPES[shape][lang]


def there(rng: np.random.Generator, split: str, lang: str, yes: bool) -> Asked:
    """Two or three different objects; asked for is one of them, or the shape of one in the colour of another."""
    number = int(rng.integers(2, 4))
    shapes = scene.distinct(rng, tuple(drawing.SHAPES), number)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), number)
    canvas = scene.choose(rng, scene.CANVASES)
    things = scene.scatter(rng, split, canvas, list(zip(shapes, colours)), (12, 18))
    asked = words(shapes[0], colours[0 if yes else 1], lang)
    return canvas, things, scene.choose(rng, THERE[lang]).format(asked).replace("a orange", "an orange")


def number(rng: np.random.Generator, split: str, lang: str, yes: bool) -> Asked:
    """Two to four objects of a kind, one other; asked for is their number, or one more or less."""
    shapes = scene.distinct(rng, tuple(drawing.SHAPES), 2)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), 2)
    asked = int(rng.integers(2, 5))
    there = asked if yes else asked + scene.choose(rng, (-1, 1))
    kinds = [(shapes[0], colours[0])] * there + [(shapes[1], colours[1])]
    canvas = scene.choose(rng, scene.CANVASES)
    things = scene.scatter(rng, split, canvas, kinds, (10, 14))
    noun = words(shapes[0], colours[0], lang)
    noun = count.plural(noun) if lang == "en" else noun
    return canvas, things, scene.choose(rng, NUMBER[lang]).format(asked, noun)


def side(rng: np.random.Generator, split: str, lang: str, yes: bool) -> Asked:
    """Two objects, one clearly on a side of the other; asked for is that side, or the opposite one."""
    while True:
        shapes = scene.distinct(rng, tuple(drawing.SHAPES), 2)
        colours = scene.distinct(rng, tuple(drawing.COLOURS), 2)
        canvas = scene.choose(rng, spatial.CANVASES)
        things = scene.scatter(rng, split, canvas, list(zip(shapes, colours)), (12, 18))
        true = spatial.side_of(*things)
        if true:
            break
    a, b = (words(t.noun, t.colour, lang) for t in things)
    return canvas, things, SIDE[true if yes else OPPOSITE[true]][lang].format(a, b)


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, yes = scene.language(rng), bool(rng.random() < 0.5)
    make = scene.choose(rng, (there, there, number, side))
    canvas, things, prompt = make(rng, split, lang, yes)
    picture, answer = scene.paint(canvas, things, split, rng), ANSWERS[lang][not yes]
    facts = {"aliases": ALIASES[answer], "choices": list(ANSWERS[lang]), "form": make.__name__}
    return scene.sample("hallucination", picture, prompt, answer, lang, "exact", **facts)


def unsure(sample: Sample) -> list[str]:
    """Both answers, the wrong one, and what commits itself to nothing."""
    yes, no = sample.meta["choices"]
    return [*choices(sample), f"{yes}{no}", f"{yes} and {no}", "maybe", "yes/no", "?", sample.prompt]


LEVELS = levels.by_kind("form", "there", "side", "number")
TASKS = (Task("hallucination", boxed(text.exact), unsure, make=generate, levels=LEVELS),)
