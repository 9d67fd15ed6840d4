"""Following instructions on form that a program can check (as IFEval, arXiv 2311.07911, section 2): how many words,
which words, in which order, in capitals, joined by what, with what first and at the end.

Half of the samples are text alone, any answer that keeps all rules is right; in the others the words are the colours or
shapes of a picture from left to right, meant for 64 x 32 and 48 x 48 pixels. Rules are in meta["rules"].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glmv_jax.data import drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed
from glmv_jax.rl.rewards.grade import RIGHT, Score
from glmv_jax.rl.task import Task

WORDS = {
    "en": ("cat", "dog", "sun", "key", "egg", "bus", "hat", "map", "owl", "pen", "tea", "box", "cup", "jam", "net"),
    "zh": ("山", "水", "火", "书", "猫", "狗", "太阳", "月饼", "苹果", "香蕉", "汽车", "飞机"),
}
JOINTS, ENDS = ("-", "/", "+", ";", "="), ("!", ".", "")
SHARE = 0.4  # of the value, of an answer that keeps some of the rules
Rules = dict[str, Any]


def kept(content: str, rules: Rules) -> list[bool]:
    """Whether each rule is kept. Rules: joint and end always; words (allowed) and count, or exact (words in their
    order); upper, sorted ("up" or "down"), first; a rule that is not there is not looked at."""
    end, joint = rules["end"], rules["joint"]
    others = any(mark in content for mark in (*JOINTS, "!", ".", ",", " ", "，", "\n") if mark not in (end, joint))
    ended = content.endswith(end) if end else not content.endswith(tuple(e for e in ENDS if e))
    words = content.removesuffix(end).split(joint)
    plain = [word.lower() for word in words] if "upper" in rules else words
    found = [ended, not others]
    if "upper" in rules:
        found.append(all(word == word.upper() for word in words))
    if "exact" in rules:
        found.append(plain == rules["exact"])
    else:
        found += [set(plain) <= set(rules["words"]), len(plain) == len(set(plain)) == rules["count"]]
    if "sorted" in rules:
        found.append(plain == sorted(plain, reverse=rules["sorted"] == "down"))
    if "first" in rules:
        found.append(plain[0] == rules["first"])
    return found


def rule(content: str, sample: Sample) -> Score:
    """Right when every rule is kept; else a share of SHARE for those that are."""
    found = kept(content, sample.meta["rules"])
    return RIGHT if all(found) else Score(SHARE * sum(found) / len(found), False)


def said(rules: Rules, lang: str) -> str:
    """The rules on form in words."""
    parts = []
    if lang == "en":
        parts += ["in capitals"] if "upper" in rules else []
        if "sorted" in rules:
            parts.append("from A to Z" if rules["sorted"] == "up" else "from Z to A")
        parts += [f"{rules['first']} first"] if "first" in rules else []
        parts.append(f'joined by "{rules["joint"]}"')
        parts += [f'end with "{rules["end"]}"'] if rules["end"] else []
        return ", ".join(parts)
    parts += [f"{rules['first']}在最前"] if "first" in rules else []
    parts.append(f'用"{rules["joint"]}"连接')
    parts += [f'以"{rules["end"]}"结尾'] if rules["end"] else []
    return "，".join(parts)


def gold(rules: Rules) -> str:
    """One answer that keeps all rules."""
    words = list(rules.get("exact") or rules["words"][: rules["count"]])
    if "first" in rules:
        words = [rules["first"], *(w for w in rules["words"] if w != rules["first"])][: rules["count"]]
    if "sorted" in rules:
        words.sort(reverse=rules["sorted"] == "down")
    text = rules["joint"].join(words) + rules["end"]
    return text.upper() if "upper" in rules else text


def form(rng: np.random.Generator, lang: str) -> Rules:
    """Rules that hold of any words."""
    rules: Rules = {"joint": scene.choose(rng, JOINTS), "end": scene.choose(rng, ENDS)}
    if lang == "en" and rng.random() < 0.5:
        rules["upper"] = True
    return rules


def plain(rng: np.random.Generator, lang: str) -> Sample:
    """Some of the given words, in a form."""
    rules = form(rng, lang)
    rules["words"] = scene.distinct(rng, WORDS[lang], int(rng.integers(4, 6)))
    rules["count"] = int(rng.integers(2, 4))
    kind = scene.choose(rng, ("sorted", "first") if lang == "en" else ("first", ""))
    if kind == "sorted":
        rules["sorted"] = scene.choose(rng, ("up", "down"))
    elif kind == "first":
        rules["first"] = scene.choose(rng, rules["words"])
    given = ("，" if lang == "zh" else ", ").join(rules["words"])
    prompt = {"en": f"{given}. Write {rules['count']} of them, {said(rules, 'en')}.",
              "zh": f"{given}。写出其中{rules['count']}个，{said(rules, 'zh')}。"}  # fmt: skip
    meta = {"check": "rules", "lang": lang, "rules": rules}
    return Sample("", "instruction", (), prompt[lang], gold(rules), meta=meta)


def pictured(rng: np.random.Generator, split: str, lang: str) -> Sample:
    """The colours or the shapes of two or three objects from left to right, in a form."""
    number = int(rng.integers(2, 4))
    shapes = scene.distinct(rng, tuple(drawing.SHAPES), number)
    colours = scene.distinct(rng, tuple(drawing.COLOURS), number)
    canvas = scene.choose(rng, ((64, 32), (48, 48)))
    while True:
        things = scene.scatter(rng, split, canvas, list(zip(shapes, colours)), (12, 16))
        things.sort(key=lambda each: each.centre)
        if all(b.centre[0] - a.centre[0] >= 6 for a, b in zip(things, things[1:])):
            break
    rules = form(rng, lang)
    if rng.random() < 0.5:
        what = {"en": "Colours", "zh": "颜色"}[lang]
        rules["exact"] = [drawing.COLOURS[each.colour].names[lang] for each in things]
    else:
        what = {"en": "Shapes", "zh": "形状"}[lang]
        rules["exact"] = [each.name(lang) for each in things]
    prompt = {"en": f"{what} from left to right, {said(rules, 'en')}.",
              "zh": f"从左到右的{what}，{said(rules, 'zh')}。"}[lang]  # fmt: skip
    picture = scene.paint(canvas, things, split, rng)
    return scene.sample("instruction", picture, prompt, gold(rules), lang, "rules", rules=rules)


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    return plain(rng, lang) if rng.random() < 0.5 else pictured(rng, split, lang)


def careless(sample: Sample) -> list[str]:
    """The right words in the wrong form, the form without words, the prompt, and everything twice."""
    rules, right = sample.meta["rules"], sample.answer
    words = right.removesuffix(rules["end"]).split(rules["joint"])
    other = next(joint for joint in JOINTS if joint != rules["joint"])
    wrong = [" ".join(words), ", ".join(words), other.join(words) + rules["end"], words[0], sample.prompt,
             f"{right} {right}", f"{right}{rules['joint']}{right}", rules["joint"] * 3, f"Here it is: {right}",
             rules["joint"].join(words[:1] * len(words)) + rules["end"], right + "?",
             right.removesuffix(rules["end"]) if rules["end"] else right + "!"]  # fmt: skip
    if "upper" in rules:
        wrong.append(right.lower())
    if "words" in rules:
        wrong.append(rules["joint"].join(rules["words"]) + rules["end"])
    if "exact" in rules:
        wrong.append(rules["joint"].join(reversed(words)) + rules["end"])
    return wrong


TASKS = (Task("instruction", boxed(rule), careless, make=generate, levels=levels.by_number("rules", 4, 5)),)
