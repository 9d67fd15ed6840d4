"""Text puzzles without a picture: sums in words, orders, letters to count, rows of numbers, days, chains of "all are".

Every puzzle has one answer that is computed; it belongs to one split by the hash of its text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from glmv_jax.data.questions import name, read, scene
from glmv_jax.data.records import Sample
from glmv_jax.data.texts import chinese_number
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, text
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.visual import choices, other_numbers

PEOPLE = {"en": ("Ann", "Bob", "Eva", "Max", "Tom", "Zoe"), "zh": ("小王", "小马", "小天", "小山", "小田", "小火")}
TALLER = {"en": "{} is taller than {}.", "zh": "{}比{}高。"}
WHO = {
    "en": ("Who is tallest?", "Who is shortest?", "Who is in the middle?"),
    "zh": ("谁最高？", "谁最矮？", "谁在中间？"),
}
DAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
ALIASES = {day: [day.replace("星期", "周")] for day in DAYS["zh"]} | {"不是": ["否", "不一定"]}
ALIASES["星期日"] += ["星期天", "周天"]
MADE_UP = ("blip", "dax", "fep", "gip", "kiv", "mog", "tup", "wug", "zim")
Drawn = tuple[str, str, list[str]]  # prompt, answer, choices ([] for a number)


def order(rng: np.random.Generator, lang: str) -> Drawn:
    """Three people, two comparisons in any order."""
    people = scene.distinct(rng, PEOPLE[lang], 3)  # from tall to short
    said = [TALLER[lang].format(*people[k : k + 2]) for k in scene.distinct(rng, (0, 1), 2)]
    asked = int(rng.integers(3))
    gap = " " if lang == "en" else ""
    return gap.join([*said, WHO[lang][asked]]), people[(0, 2, 1)[asked]], people


def letters(rng: np.random.Generator, lang: str) -> Drawn:
    """How often a letter is in a word that has it."""
    word = scene.choose(rng, name.NAMES)
    letter = scene.choose(rng, sorted(set(word)))
    asked = {"en": f'How many "{letter}" in "{word}"?', "zh": f"{word}里有几个{letter}？"}
    return asked[lang], str(word.count(letter)), []


def row(rng: np.random.Generator, lang: str) -> Drawn:
    """The next number of a row with a fixed step or a step that grows by a fixed number."""
    first, step, growth = int(rng.integers(1, 20)), int(rng.integers(1, 9)), int(rng.integers(0, 3))
    numbers = [first + step * k + growth * k * (k - 1) // 2 for k in range(5)]
    shown = ", ".join(map(str, numbers[:4]))
    return {"en": f"What comes next: {shown}, ?", "zh": f"下一个数是几：{shown}，？"}[lang], str(numbers[4]), []


def day(rng: np.random.Generator, lang: str) -> Drawn:
    """The day of the week so many days ahead."""
    today, ahead = int(rng.integers(7)), int(rng.integers(2, 12))
    asked = {
        "en": f"Today is {DAYS['en'][today]}. Which day is it in {ahead} days?",
        "zh": f"今天是{DAYS['zh'][today]}。{chinese_number(ahead)}天后是星期几？",
    }
    return asked[lang], DAYS[lang][(today + ahead) % 7], list(DAYS[lang])


def chain(rng: np.random.Generator, lang: str) -> Drawn:
    """All a are b, all b are c: is every a a c (yes), is every c an a (no)?"""
    a, b, c = scene.distinct(rng, MADE_UP, 3)
    yes = rng.random() < 0.5
    x, y = (a, c) if yes else (c, a)
    said = [f"All {a}s are {b}s.", f"All {b}s are {c}s."] if lang == "en" else [f"{a}都是{b}。", f"{b}都是{c}。"]
    said = scene.distinct(rng, said, 2)
    if lang == "en":
        return f"{' '.join(said)} Must every {x} be a {y}?", ("yes" if yes else "no"), ["yes", "no"]
    return f"{''.join(said)}{x}一定是{y}吗？", ("是" if yes else "不是"), ["是", "不是"]


def story(rng: np.random.Generator, lang: str) -> Drawn:
    """Someone has some things, gets more, gives some away."""
    person, other = scene.distinct(rng, PEOPLE[lang], 2)
    has, gets = (int(v) for v in rng.integers(2, 20, 2))
    gives = int(rng.integers(1, has + gets))
    asked = {
        "en": f"{person} has {has} pens, buys {gets} and gives {other} {gives}. How many are left?",
        "zh": f"{person}有{has}支笔，又买了{gets}支，给了{other}{gives}支。还有几支？",
    }
    return asked[lang], str(has + gets - gives), []


PUZZLES: tuple[Callable[[np.random.Generator, str], Drawn], ...] = (order, letters, row, day, chain, story)


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    while True:
        make = scene.choose(rng, PUZZLES)
        prompt, answer, options = make(rng, lang)
        if read.belongs(prompt, split):
            break
    meta = {"check": "exact" if options else "numeric", "lang": lang, "puzzle": make.__name__}
    if options:
        meta |= {"choices": options, "aliases": ALIASES.get(answer, [])}
    return Sample(id="", source="riddle", images=(), prompt=prompt, answer=answer, meta=meta)


def guesses(sample: Sample) -> list[str]:
    """All choices, each wrong one, near misses of a number, and the question."""
    return [*choices(sample), *other_numbers(sample), sample.prompt]


LEVELS = levels.by_kind("puzzle", ("chain", "order"), ("letters", "row", "day"), "story")
TASKS = (Task("riddle", boxed(text.number()), guesses, make=generate, levels=LEVELS),)
