"""Plain text in Chinese and English for pretraining: definitions, translations and arithmetic, drawn from seeds.

Words come from the emoji names and keywords (Unicode CLDR); those of held-out concepts appear in held-out texts only.
A sum belongs to one split by its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from glmv_jax.data import emoji
from glmv_jax.data.records import Sample
from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.typing import UserError

DIGITS = "零一二三四五六七八九"
HELD_OUT_SHARE = 5  # one sum in five


T = TypeVar("T")


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _concept(rng: np.random.Generator, split: str) -> emoji.Emoji:
    return emoji.load()[_pick(rng, emoji.split(split))]


def definition(rng: np.random.Generator, split: str) -> tuple[str, str]:
    """"cat: animal, pet." in one of the languages; keywords in random order."""
    e, lang = _concept(rng, split), _pick(rng, emoji.LANGUAGES)
    name, *words = e.texts[lang]
    words = [words[i] for i in rng.permutation(len(words))[:4]] or [name]
    if lang == "zh":
        return f"{name}：{'、'.join(words)}。", lang
    return _pick(rng, ("{}: {}.", "{} has to do with {}.")).format(name, ", ".join(words)), lang


def translation(rng: np.random.Generator, split: str) -> tuple[str, str]:
    """"cat = 猫" in one of several forms. The language is that of the sentence."""
    e = _concept(rng, split)
    en, zh = e.name("en"), e.name("zh")
    form, lang = _pick(
        rng,
        (
            (f"{en} = {zh}", "en"), (f"{zh} = {en}", "zh"), (f"In Chinese, {en} is {zh}.", "en"),
            (f"{zh} means {en}.", "en"), (f"{zh}的英文是{en}。", "zh"), (f"英文{en}的意思是{zh}。", "zh"),
        ),
    )  # fmt: skip
    return form, lang


def chinese_number(value: int) -> str:
    """0 to 99 in Chinese: 7 = 七, 10 = 十, 42 = 四十二."""
    tens, ones = divmod(value, 10)
    if tens == 0:
        return DIGITS[ones]
    return ("" if tens == 1 else DIGITS[tens]) + "十" + (DIGITS[ones] if ones else "")


def sums(rng: np.random.Generator, split: str) -> tuple[str, str]:
    """An addition or subtraction of numbers below 50, in digits or in Chinese numerals."""
    while True:
        a, b = (int(v) for v in rng.integers(0, 50, 2))
        if ((7 * a + 3 * b) % HELD_OUT_SHARE == 0) == (split == "heldout"):
            break
    add = rng.random() < 0.5
    first, result = (a, a + b) if add else (a + b, a)
    if rng.random() < 0.5:
        return f"{first} {'+' if add else '-'} {b} = {result}", "en"
    return f"{chinese_number(first)}{'加' if add else '减'}{chinese_number(b)}等于{chinese_number(result)}", "zh"


KINDS: tuple[Callable[[np.random.Generator, str], tuple[str, str]], ...] = (definition, translation, sums)


class Texts:
    """Endless random access to text-only samples: no image, no prompt, the text as answer, source "text"."""

    def __init__(self, split: str, seed: int = 0):
        if split not in ("train", "heldout"):
            raise UserError(f"text split {split!r} does not exist; use train or heldout")
        self.split, self.seed = split, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Sample:
        text, lang = KINDS[i % len(KINDS)](generator(self.seed, self.split, "text", i), self.split)
        return Sample(f"text/{self.split}/{i}", "text", (), "", text, boxed=False, meta={"check": "text", "lang": lang})
