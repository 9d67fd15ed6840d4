"""Questions about a small page: a bill with items, prices and their total, or a form of fields.

Meant for 96 x 64 pixels (96 patches of 8), letters of 10 pixels. What is asked for is written on the page, or is the
largest of its numbers, or how many items there are.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing, fonts
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import choices, other_numbers

CANVAS, LETTERS, STEP = (96, 64), 10, 12
ITEMS = {
    "en": ("apple", "bread", "egg", "pizza", "key", "pen", "lamp", "book", "tea", "cup", "hat", "bag"),
    "zh": ("梨", "面包", "蛋", "钥匙", "帽", "书", "茶", "米饭", "香蕉", "玉米", "蛋糕", "南瓜"),
}
TITLES = {"en": ("Report", "Note", "File"), "zh": ("报告", "说明", "文件")}
FIELDS = {"en": ("Name", "Date", "Room", "Seat", "Price"), "zh": ("姓名", "日期", "电话", "座位", "价格")}
NAMES = {
    "en": ("Ann", "Bob", "Eva", "Max", "Tom", "Zoe", "Lee", "Kim"),
    "zh": ("王大山", "马小天", "王小心", "马上", "王火", "马天", "王一心", "马大水"),
}
PRICE = {"en": ("Price of {}?", "What does {} cost?"), "zh": ("{}多少钱？", "{}的价格是多少？")}
TOTAL = {"en": ("The total?", "What is the total?"), "zh": ("总计是多少？", "一共多少钱？")}
DEAREST = {"en": ("Which costs most?", "The dearest item?"), "zh": ("最贵的是什么？", "哪个最贵？")}
HOW_MANY = {"en": ("How many items?", "Count the items."), "zh": ("有几种商品？", "数一数商品。")}
FIELD = {"en": ("{}?", "What is the {}?"), "zh": ("{}是什么？", "{}？")}


def page(rows: list[tuple[str, str]], title: str, lang: str, split: str, rng: np.random.Generator) -> Image.Image:
    """A title over rows of a label at the left and a value at the right, black or coloured on light paper."""
    picture = Image.new("RGB", CANVAS, drawing.background(split, rng))
    pen, font = ImageDraw.Draw(picture), fonts.face(split, lang, rng, LETTERS)
    accent = drawing.COLOURS[scene.choose(rng, ("blue", "green", "purple", "black"))].shade(split, rng)
    left, right, y = int(rng.integers(3, 8)), CANVAS[0] - int(rng.integers(3, 8)), int(rng.integers(0, 3))
    if title:
        pen.text((CANVAS[0] / 2, y), title, font=font, fill=accent, anchor="ma")
        y += STEP
        pen.line((left, y + 1, right, y + 1), fill=accent)
    for label, value in rows:
        pen.text((left, y + 2), label, font=font, fill=(25, 25, 30))
        pen.text((right, y + 2), value, font=font, fill=(25, 25, 30), anchor="ra")
        y += STEP
    return picture


def bill(rng: np.random.Generator, lang: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Rows of items with different prices and of their total; questions with answers."""
    names = scene.distinct(rng, ITEMS[lang], int(rng.integers(2, 4)))
    prices = [int(p) + 1 for p in rng.permutation(30)[: len(names)]]
    ask = lambda forms: scene.choose(rng, forms[lang])  # noqa: E731
    turns = [(ask(PRICE).format(name), str(price)) for name, price in zip(names, prices)]
    turns += [(ask(TOTAL), str(sum(prices))), (ask(DEAREST), names[prices.index(max(prices))])]
    turns += [(ask(HOW_MANY), str(len(names)))]
    total = {"en": "Total", "zh": "总计"}[lang]
    return [*zip(names, map(str, prices)), (total, str(sum(prices)))], turns


def form(rng: np.random.Generator, lang: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Rows of fields and their values; a question for each."""
    rows = []
    for label in scene.distinct(rng, FIELDS[lang], 3):
        if label in ("Name", "姓名"):
            value = scene.choose(rng, NAMES[lang])
        elif label in ("Date", "日期"):
            value = f"{int(rng.integers(1, 13))}-{int(rng.integers(10, 29))}"
        else:
            value = str(int(rng.integers(10, 1000)))
        rows.append((label, value))
    asked = [label if lang == "zh" else label.lower() for label, _ in rows]
    return rows, [(scene.choose(rng, FIELD[lang]).format(label), value) for label, (_, value) in zip(asked, rows)]


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    while True:
        rows, turns = (bill if rng.random() < 0.6 else form)(rng, lang)
        if read.belongs(repr(rows), split):
            break
    title = scene.choose(rng, TITLES[lang]) if len(rows) < 4 and rng.random() < 0.5 else ""
    picture = page(rows, title, lang, split, rng)
    turns = scene.distinct(rng, turns, 2)
    values = [cell for row in rows for cell in row]
    return scene.quiz("document", picture, turns, lang, "numeric", choices=values)


def elsewhere(sample: Sample) -> list[str]:
    """The whole page, every other cell of it, and near misses of a number."""
    return choices(sample) + other_numbers(sample)


TASKS = (Task("document", boxed(text.number()), elsewhere, make=generate, levels=levels.by_number("choices", 8)),)
