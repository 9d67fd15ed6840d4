"""A window with fields, check boxes and buttons, drawn from a tree of elements: their boxes and states are known
exactly, and an action gives the window after it.

Drawn with Pillow, as small as a tiny model can see. What a real page needs beyond it (scrolling, menus, style sheets)
is not there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import documents, drawing, emoji, fonts

KINDS = ("label", "field", "checkbox", "button")
SIZES = ((96, 96), (128, 96), (112, 128))
TEXT, ROW, BAR, EDGE = 10, 19, 14, 4  # pixels: letters, a row, the title bar, the margin

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels; the right and bottom edges are outside


@dataclasses.dataclass(frozen=True)
class Element:
    """name: what it says, or for a field what the label before it says. value: what a field holds. on: ticked."""

    kind: str
    name: str
    box: Box
    value: str = ""
    on: bool = False

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclasses.dataclass(frozen=True)
class Look:
    """Colours and face of a window."""

    paper: drawing.RGB
    ink: drawing.RGB
    accent: drawing.RGB
    face: str


@dataclasses.dataclass(frozen=True)
class Window:
    """size: (width, height). focus: number of the field that letters go to, -1: none. pressed: name of the button that
    was pressed last, which the title bar says."""

    size: tuple[int, int]
    lang: str
    title: str
    elements: tuple[Element, ...]
    look: Look
    focus: int = -1
    pressed: str = ""

    def of(self, kind: str) -> list[Element]:
        return [element for element in self.elements if element.kind == kind]

    def at(self, x: float, y: float) -> int:
        """Number of the element at a point in pixels, -1 for none; labels do not count."""
        inside = (n for n, e in enumerate(self.elements) if e.kind != "label" and e.box[0] <= x < e.box[2]
                  and e.box[1] <= y < e.box[3])  # fmt: skip
        return next(inside, -1)

    def click(self, x: float, y: float) -> Window:
        """The window after a click at a point in pixels."""
        number = self.at(x, y)
        if number < 0:
            return dataclasses.replace(self, focus=-1)
        element = self.elements[number]
        if element.kind == "field":
            return dataclasses.replace(self, focus=number)
        if element.kind == "checkbox":
            return self._with(number, on=not element.on)
        return dataclasses.replace(self, pressed=element.name, focus=-1)

    def type(self, text: str) -> Window:
        """The window after letters; without a field that has the focus nothing happens."""
        if self.focus < 0:
            return self
        return self._with(self.focus, value=self.elements[self.focus].value + text)

    def _with(self, number: int, **changes: Any) -> Window:
        elements = list(self.elements)
        elements[number] = dataclasses.replace(elements[number], **changes)
        return dataclasses.replace(self, elements=tuple(elements), focus=number if "value" in changes else -1)


def generate(rng: np.random.Generator, split: str) -> Window:
    """A window of the split's colours and faces: one or two fields with labels, one or two check boxes, one to three
    buttons; no two of these have one name."""
    lang = emoji.LANGUAGES[int(rng.integers(2))]
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    face = fonts.face_name(split, lang, rng)
    papers = documents.PAPER[split]
    paper = papers[int(rng.integers(len(papers)))]
    accents = documents.ACCENTS[:-1]
    accent = drawing.COLOURS[accents[int(rng.integers(len(accents)))]].shade(split, rng)
    look = Look(paper, (25, 25, 30) if sum(paper) > 300 else (225, 225, 230), accent, face)
    words = [str(word) for word in rng.permutation(documents.WORDS[lang])]
    fields, boxes = (int(n) for n in rng.integers(1, 3, 2))
    elements: list[Element] = []
    y = BAR + EDGE
    for _ in range(fields):
        name, middle = words.pop(), int(width * 0.45)
        elements.append(Element("label", name, (EDGE, y, min(middle - 2, EDGE + _wide(look, name)), y + TEXT + 4)))
        elements.append(Element("field", name, (middle, y, width - EDGE, y + TEXT + 5)))
        y += ROW
    for _ in range(boxes if y + 2 * ROW + ROW <= height else 1):
        name = words.pop()
        box = EDGE, y, min(width - EDGE, EDGE + TEXT + 4 + _wide(look, name)), y + TEXT + 4
        elements.append(Element("checkbox", name, box, on=bool(rng.random() < 0.3)))
        y += ROW
    x = EDGE
    for _ in range(3):
        name = words.pop()
        right = x + _wide(look, name) + 10
        if right <= width - EDGE:
            elements.append(Element("button", name, (x, y, right, y + TEXT + 6)))
            x = right + 5
    return Window((width, height), lang, words.pop(), tuple(elements), look)


def _wide(look: Look, text: str) -> int:
    return int(fonts.load(look.face, TEXT).getlength(text)) + 2


def draw(window: Window) -> Image.Image:
    """The window as a picture. Nothing of an element is drawn outside its box."""
    picture = Image.new("RGB", window.size, window.look.paper)
    pen = ImageDraw.Draw(picture)
    font, look = fonts.load(window.look.face, TEXT), window.look
    pen.rectangle((0, 0, window.size[0], BAR - 1), fill=look.accent)
    bar = f"{window.title}: {window.pressed}" if window.pressed else window.title
    pen.text((EDGE, BAR // 2), bar, font=font, fill=(255, 255, 255), anchor="lm")
    for number, element in enumerate(window.elements):
        left, top, right, bottom = element.box
        own = Image.new("RGB", (right - left, bottom - top), look.paper)
        _draw(ImageDraw.Draw(own), own.size, element, number == window.focus, look, font)
        picture.paste(own, (left, top))
    return picture


def _draw(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], element: Element, focused: bool, look: Look, font: Any
) -> None:
    width, height = size
    middle = height / 2
    if element.kind == "label":
        pen.text((0, middle), element.name, font=font, fill=look.ink, anchor="lm")
    elif element.kind == "field":
        pen.rectangle((0, 0, width - 1, height - 1), outline=look.accent if focused else look.ink, width=1 + focused)
        pen.text((3, middle), element.value, font=font, fill=look.ink, anchor="lm")
    elif element.kind == "checkbox":
        pen.rectangle((0, 2, TEXT, 2 + TEXT), outline=look.ink)
        if element.on:
            pen.line(((2, 7), (4, 10), (TEXT - 1, 4)), fill=look.accent, width=2)
        pen.text((TEXT + 4, middle), element.name, font=font, fill=look.ink, anchor="lm")
    else:
        pen.rounded_rectangle((0, 0, width - 1, height - 1), 3, fill=look.accent)
        pen.text((width / 2, middle), element.name, font=font, fill=(255, 255, 255), anchor="mm")
