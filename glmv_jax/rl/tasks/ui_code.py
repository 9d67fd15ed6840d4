"""Code of a page: HTML that looks like the picture, rendered in a headless Chromium as the picture was.

Half of the pages are coloured areas alone, legible at their 64 x 48 pixels; the others have words too and are 128 x 96.
Faces are those of the machine, the same for the gold page and for the answer, so the words are Latin. No script runs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.agents import browser
from glmv_jax.data import documents, drawing
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, pictures, text
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score, extract_box
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.svg import unfenced
from glmv_jax.typing import UserError

MOST = 4096  # characters
AREAS, WORDS = (64, 48), (128, 96)
PROMPTS = {"en": "HTML of this page, {} x {} pixels.", "zh": "这个网页的HTML，{} x {} 像素。"}
ENOUGH = 0.85  # a page counts as right when its pixels and its blocks are as near as this


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    size, make = scene.choose(rng, ((AREAS, _areas), (WORDS, _words)))
    code = make(rng, split)
    page = _page(code, size)
    if page is None:
        raise UserError("the browser did not render a page of ours; is the machine overloaded?")
    prompt = PROMPTS[lang].format(*size)
    return scene.sample("ui_code", page.picture, prompt, code, lang, "page", size=list(size))


def _shades(rng: np.random.Generator, split: str, count: int) -> list[str]:
    names = scene.distinct(rng, tuple(drawing.COLOURS), count)
    return ["#{:02x}{:02x}{:02x}".format(*drawing.COLOURS[name].shade(split, rng)) for name in names]


def _areas(rng: np.random.Generator, split: str) -> str:
    """A bar at the top, and one or two blocks under it."""
    bar, *shades = _shades(rng, split, 3)
    parts = [f'<div style="height:{int(rng.integers(6, 13))}px;background:{bar}"></div>']
    for shade in shades[: int(rng.integers(1, 3))]:
        left, top, width, height = (int(rng.integers(*r)) for r in ((0, 24), (2, 7), (14, 36), (7, 13)))
        parts.append(
            f'<div style="margin:{top}px {left}px;width:{width}px;height:{height}px;background:{shade}"></div>'
        )
    return f'<body style="margin:0">{"".join(parts)}'


def _words(rng: np.random.Generator, split: str) -> str:
    """A title bar, a line of text, maybe a field, a button."""
    bar, button = _shades(rng, split, 2)
    words = documents.WORDS["en"]
    title, label, action = (_word(rng, words, split) for _ in range(3))
    parts = [f'<div style="padding:4px;background:{bar};color:{_ink(bar)}">{title}</div>',
             f'<div style="margin:{int(rng.integers(3, 8))}px">{label} {rng.integers(10, 1000)}</div>']  # fmt: skip
    if rng.random() < 0.5:
        parts.append('<div style="margin:4px;height:14px;border:1px solid #000"></div>')
    left = int(rng.integers(4, 50))
    look = f"margin:6px {left}px;width:60px;padding:3px;background:{button};color:{_ink(button)}"
    parts.append(f'<div style="{look}">{action}</div>')
    return f'<body style="margin:0;font:12px sans-serif">{"".join(parts)}'


def _ink(shade: str) -> str:
    """A colour for letters that is read on the shade."""
    return "#fff" if sum(bytes.fromhex(shade[1:])) < 420 else "#000"


def _word(rng: np.random.Generator, words: tuple[str, ...], split: str) -> str:
    """A word that belongs to the split."""
    return scene.choose(rng, [word for word in words if read.belongs(word, split)])


@functools.lru_cache(maxsize=64)
def _page(code: str, size: tuple[int, int]) -> browser.Page | None:
    return browser.render(code, size)


def parts(content: str, sample: Sample) -> tuple[float, float] | None:
    """(nearness of the pixels, agreement of the blocks) with the gold page, each in [0, 1]; None for what is no page.

    Blocks are texts and areas with a colour of their own: IoU of their boxes, alike in colour, and in letters by
    `similarity`. Raises UserError where there is no browser.
    """
    code = unfenced(content)
    if "<" not in code:
        return None
    size = tuple(sample.meta["size"])
    found, gold = browser.render(code, size), _page(sample.answer, size)
    if found is None or gold is None:
        return None
    blocks = pictures.structure(found.blocks, gold.blocks, lambda block: block.box, _same)
    return pictures.closeness(found.picture, gold.picture), blocks


def _same(a: browser.Block, b: browser.Block) -> float:
    if bool(a.text) != bool(b.text):
        return 0.0
    return pictures.alike(a.colour, b.colour) * text.similarity(a.text[:200], b.text)


def rendered() -> Rule:
    """A rule for pages: the nearness of the pixels times the agreement of the blocks, so that neither blocks that are
    covered nor a picture with more around it pay. Correct when both are ENOUGH."""

    def rule(content: str, sample: Sample) -> Score:
        found = parts(content, sample)
        if found is None:
            return WRONG
        return Score(found[0] * found[1], min(found) >= ENOUGH)

    return rule


def render(answer_text: str, sample: Sample) -> Image.Image | None:
    """The picture of an answer, None for one without a box or a page: what a group is compared by (RVPO)."""
    content, flag = extract_box(answer_text, MOST)
    code = unfenced(content)
    page = browser.render(code, tuple(sample.meta["size"])) if not flag and "<" in code else None
    return page.picture if page else None


def nearer(sample: Sample, a: Any, b: Any) -> tuple[float, float]:
    """The scores of two rendered answers by how near they are to the page that was shown: a comparator by rule."""
    return pictures.closeness(a.picture, sample.images[0]), pictures.closeness(b.picture, sample.images[0])


def hacks(sample: Sample) -> list[str]:
    """Nothing, a page of one colour, the words alone, many blocks, the gold page covered, a script that draws it."""
    page: Any = _page(sample.answer, tuple(sample.meta["size"]))
    said = " ".join(block.text for block in page.blocks if block.text)
    colour = "rgb({},{},{})".format(*page.blocks[0].colour)
    cover = '<div style="position:fixed;inset:0;background:{}"></div>'
    return [
        "<p></p>",
        f'<body style="background:{colour}">',
        f"<p>{said}",
        f'<div style="height:4px;background:{colour}"></div>' * 40,
        sample.answer + cover.format("#fff"),
        "<script>document.write(" + repr(sample.answer) + ")</script>",
        '<iframe src="http://127.0.0.1/"></iframe><img src="file:///etc/passwd">',
        sample.prompt,
    ]


VERIFIER = boxed(rendered(), most=MOST)
LEVELS = levels.by_length(200, 240)
TASKS = (Task("ui_code", VERIFIER, hacks, make=generate, missing=browser.missing, seconds=90.0, levels=LEVELS),)
