"""Rendered pages and user-interface panels, drawn with Pillow: the instruction-following share of images."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, emoji, fonts

# What buttons, menus and titles say.
WORDS = {
    "en": (
        "OK", "Cancel", "Save", "Open", "Close", "Edit", "View", "Help", "File", "Search", "Send", "Next", "Back",
        "Login", "Name", "Email", "Date", "Total", "Price", "Report", "Settings", "Chapter", "Contents", "Figure",
        "Table", "Note",
    ),
    "zh": (
        "确定", "取消", "保存", "打开", "关闭", "编辑", "查看", "帮助", "文件", "搜索", "发送", "下一步", "返回",
        "登录", "姓名", "邮箱", "日期", "总计", "价格", "报告", "设置", "章节", "目录", "图", "表", "说明",
    ),
}  # fmt: skip
LONGEST_NAME = 4  # Chinese names up to this length are covered by the shipped faces
PAPER = {
    "train": ((255, 255, 255), (250, 248, 240), (244, 246, 250), (40, 42, 54)),
    "heldout": ((253, 253, 250), (242, 246, 240), (30, 34, 40)),
}
ACCENTS = ("blue", "green", "purple", "red", "orange", "black")


@functools.cache
def body_words(lang: str) -> tuple[str, ...]:
    """Words for running text: the labels above and the short emoji names."""
    names = [e.name(lang) for e in emoji.load()]
    longest = LONGEST_NAME if lang == "zh" else 14
    return WORDS[lang] + tuple(n for n in names if len(n) <= longest and n.isascii() == (lang == "en"))


class Sheet:
    """A picture under construction with its pen, faces and colours."""

    def __init__(self, size: tuple[int, int], split: str, rng: np.random.Generator):
        self.rng, self.size = rng, size
        self.lang = emoji.LANGUAGES[int(rng.integers(2))]
        papers = PAPER[split]
        self.paper = papers[int(rng.integers(len(papers)))]
        self.ink = (25, 25, 30) if sum(self.paper) > 300 else (225, 225, 230)
        self.accent = drawing.COLOURS[ACCENTS[int(rng.integers(len(ACCENTS)))]].shade(split, rng)
        names = fonts.files(split, self.lang)
        self.face = names[int(rng.integers(len(names)))]
        self.icons = emoji.split(split)
        self.picture = Image.new("RGB", size, self.paper)
        self.pen = ImageDraw.Draw(self.picture)

    def word(self, label: bool = False) -> str:
        words = WORDS[self.lang] if label else body_words(self.lang)
        return words[int(self.rng.integers(len(words)))]

    def write(self, x: int, y: int, text: str, height: int, fill: drawing.RGB | None = None) -> None:
        """One line of text, its top left at (x, y)."""
        self.pen.text((x, y), text, font=fonts.load(self.face, height), fill=fill or self.ink)

    def icon(self, x: int, y: int, side: int) -> None:
        """An emoji of the split as an illustration."""
        emoji.paste(self.picture, emoji.stamp(self.icons[int(self.rng.integers(len(self.icons)))], side), x, y)

    def line(self, x: int, y: int, width: int, height: int) -> None:
        """A line of running text about `width` pixels long."""
        gap = "" if self.lang == "zh" else " "
        letters = 2 * width // height + 1
        text = self.word()
        while len(text) * (2 if self.lang == "zh" else 1) < letters:
            text += gap + self.word()
        self.write(x, y, text[: letters // (2 if self.lang == "zh" else 1)], height)


def page(rng: np.random.Generator, split: str, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A page: a heading, paragraphs, now and then a table, a list or a picture."""
    sheet = Sheet(size, split, rng)
    width, height = size
    small = int(rng.integers(7, 11))
    margin, y = int(rng.integers(3, 9)), int(rng.integers(2, 8))
    if rng.random() < 0.7:
        sheet.write(margin, y, sheet.word(label=True), small + 4, sheet.accent)
        y += small + 8
    while y < height:
        part = rng.random()
        if part < 0.15:
            y = _table(sheet, margin, y, small)
        elif part < 0.3:
            side = int(rng.integers(18, 30))
            sheet.icon(margin, y, side)
            for k in range(2):
                sheet.line(margin + side + 4, y + k * (small + 3), width - 2 * margin - side, small)
            y += side + 4
        else:
            indent = 8 if part < 0.5 else 0
            for _ in range(int(rng.integers(2, 5))):
                if indent:
                    sheet.pen.ellipse((margin, y + small // 2, margin + 3, y + small // 2 + 3), fill=sheet.accent)
                sheet.line(margin + indent, y, int(rng.uniform(0.6, 1.0) * (width - 2 * margin - indent)), small)
                y += small + 3
            y += 4
    return sheet.picture


def _table(sheet: Sheet, x: int, y: int, small: int) -> int:
    """A ruled table of 2 or 3 columns from y on; returns the y below it."""
    rows, columns = int(sheet.rng.integers(2, 4)), int(sheet.rng.integers(2, 4))
    right, row_height = sheet.size[0] - x, small + 5
    column = (right - x) // columns
    for row in range(rows):
        for c in range(columns):
            text = sheet.word(label=True) if row == 0 else str(int(sheet.rng.integers(1000)))
            sheet.write(x + c * column + 2, y + row * row_height + 2, text, small)
    for row in range(rows + 1):
        sheet.pen.line((x, y + row * row_height, x + columns * column, y + row * row_height), fill=sheet.accent)
    for c in range(columns + 1):
        sheet.pen.line((x + c * column, y, x + c * column, y + rows * row_height), fill=sheet.accent)
    return y + rows * row_height + 5


def panel(rng: np.random.Generator, split: str, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A window: title bar with buttons, then rows of fields, check boxes, sliders, buttons or icons."""
    sheet = Sheet(size, split, rng)
    width, height = size
    small, bar = int(rng.integers(8, 11)), int(rng.integers(12, 18))
    sheet.pen.rectangle((0, 0, width, bar), fill=sheet.accent)
    sheet.write(4, (bar - small) // 2 - 1, sheet.word(label=True), small, (255, 255, 255))
    for k in range(3):
        x = width - 8 - 8 * k
        sheet.pen.ellipse((x, bar // 2 - 2, x + 4, bar // 2 + 2), fill=(255, 255, 255))
    rows = (_field, _checks, _slider, _buttons, _icons)
    y = bar + 4
    while y < height - 8:
        y += rows[int(rng.integers(len(rows)))](sheet, y, small) + 5
    return sheet.picture


def _field(sheet: Sheet, y: int, small: int) -> int:
    middle = sheet.size[0] * 2 // 5
    sheet.write(4, y + 2, sheet.word(label=True), small)
    sheet.pen.rectangle((middle, y, sheet.size[0] - 5, y + small + 5), outline=sheet.ink)
    sheet.write(middle + 3, y + 2, sheet.word(), small)
    return small + 5


def _checks(sheet: Sheet, y: int, small: int) -> int:
    for k in range(2):
        x = 4 + k * sheet.size[0] // 2
        sheet.pen.rectangle((x, y + 1, x + small, y + 1 + small), outline=sheet.ink)
        if sheet.rng.random() < 0.5:
            sheet.pen.line(((x + 2, y + small // 2), (x + small // 2, y + small - 1), (x + small - 1, y + 3)),
                           fill=sheet.accent, width=2)  # fmt: skip
        sheet.write(x + small + 3, y + 1, sheet.word(label=True), small)
    return small + 2


def _slider(sheet: Sheet, y: int, small: int) -> int:
    left, right = 6, sheet.size[0] - 7
    x = int(sheet.rng.integers(left, right))
    middle = y + small // 2
    sheet.pen.line((left, middle, right, middle), fill=(150, 150, 155), width=2)
    sheet.pen.line((left, middle, x, middle), fill=sheet.accent, width=2)
    sheet.pen.ellipse((x - 4, middle - 4, x + 4, middle + 4), fill=sheet.accent)
    return small


def _buttons(sheet: Sheet, y: int, small: int) -> int:
    count = int(sheet.rng.integers(1, 4))
    step = (sheet.size[0] - 4) // count
    for k in range(count):
        box = (4 + k * step, y, 4 + (k + 1) * step - 5, y + small + 6)
        filled = sheet.rng.random() < 0.5
        sheet.pen.rounded_rectangle(box, 3, fill=sheet.accent if filled else None, outline=sheet.accent)
        ink = (255, 255, 255) if filled else sheet.ink
        sheet.pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), sheet.word(label=True),
                       font=fonts.load(sheet.face, small), fill=ink, anchor="mm")  # fmt: skip
    return small + 6


def _icons(sheet: Sheet, y: int, small: int) -> int:
    side = int(sheet.rng.integers(14, 22))
    for x in range(4, sheet.size[0] - side, side + 6):
        sheet.icon(x, y, side)
    return side
