"""Text coding: write a Python function that does what one sentence says; hidden tests run it in `agents.sandbox`.

A sentence is a chain of two or three operations on a list of integers or a word. Which chains belong to the held-out
split is decided by their hash. The examples in the prompt are not among the tests, and the expected results never enter
the process that the program runs in. No picture.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from glmv_jax.agents import sandbox
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score
from glmv_jax.rl.task import Task
from glmv_jax.rl.tasks.svg import unfenced

MOST = 2048  # characters
EXAMPLES, TESTS = 2, 8
PARTLY = 0.3  # of a program that passes some tests: a constant may do that


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation: what it says in both languages, its statement on `a`; {k} is a number from 2 to 5."""

    en: str
    zh: str
    code: str


KEEP = (
    Step("keep the even numbers", "保留偶数", "a=[x for x in a if x%2==0]"),
    Step("keep the odd numbers", "保留奇数", "a=[x for x in a if x%2]"),
    Step("keep what is greater than {k}", "保留大于{k}的数", "a=[x for x in a if x>{k}]"),
    Step("keep what {k} divides", "保留{k}的倍数", "a=[x for x in a if x%{k}==0]"),
    Step("drop the first {k}", "去掉前{k}个", "a=a[{k}:]"),
    Step("take every second one", "每隔一个取一个", "a=a[::2]"),
    Step("drop repeats, keep the first of each", "去掉重复，保留第一个", "a=list(dict.fromkeys(a))"),
)
CHANGE = (
    Step("square each", "每个求平方", "a=[x*x for x in a]"),
    Step("add {k} to each", "每个加{k}", "a=[x+{k} for x in a]"),
    Step("multiply each by {k}", "每个乘{k}", "a=[x*{k} for x in a]"),
    Step("take each modulo {k}", "每个对{k}取余", "a=[x%{k} for x in a]"),
    Step("reverse the order", "倒序", "a=a[::-1]"),
    Step("sort upwards", "升序排列", "a=sorted(a)"),
    Step("sort downwards", "降序排列", "a=sorted(a,reverse=True)"),
    Step("replace each by the sum up to it", "每个换成到它为止的和", "a=[sum(a[:i+1]) for i in range(len(a))]"),
)
END = (
    Step("return the sum", "返回总和", "return sum(a)"),
    Step("return the list", "返回列表", "return a"),
    Step("return how many there are", "返回个数", "return len(a)"),
    Step("return the greatest, 0 for none", "返回最大值，没有则为0", "return max(a,default=0)"),
    Step("return the difference of greatest and least, 0 for none", "返回最大与最小之差，没有则为0",
         "return max(a)-min(a) if a else 0"),
)  # fmt: skip
LETTERS = (
    Step("reverse it", "反转", "a=a[::-1]"),
    Step("drop the vowels", "去掉元音", "a=''.join(x for x in a if x not in 'aeiou')"),
    Step("double each letter", "每个字母写两遍", "a=''.join(x*2 for x in a)"),
    Step("sort its letters", "字母排序", "a=''.join(sorted(a))"),
    Step("keep the first {k} letters", "保留前{k}个字母", "a=a[:{k}]"),
    Step("drop repeated letters, keep the first of each", "去掉重复字母，保留第一个", "a=''.join(dict.fromkeys(a))"),
)
LETTERS_END = (
    Step("return it", "返回它", "return a"),
    Step("return its length", "返回长度", "return len(a)"),
    Step("return the number of vowels", "返回元音个数", "return sum(x in 'aeiou' for x in a)"),
)
PROMPTS = {
    "en": "Python f(a), a is {}: {}. {}",
    "zh": "Python f(a)，a是{}：{}。{}",
}
KINDS = {"list": {"en": "a list of integers", "zh": "整数列表"}, "word": {"en": "a word", "zh": "一个单词"}}
JOIN = {"en": ", ", "zh": "，"}


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang, kind = scene.language(rng), scene.choose(rng, ("list", "list", "word"))
    while True:
        if kind == "list":
            middle = [scene.choose(rng, KEEP), *scene.distinct(rng, CHANGE, int(rng.integers(0, 2)))]
            steps = [*(middle if rng.random() < 0.5 else middle[::-1]), scene.choose(rng, END)]
        else:
            steps = [*scene.distinct(rng, LETTERS, int(rng.integers(1, 3))), scene.choose(rng, LETTERS_END)]
        numbers = [int(k) for k in rng.integers(2, 6, len(steps))]
        code = "def f(a):" + "".join("\n " + s.code.replace("{k}", str(k)) for s, k in zip(steps, numbers))
        if belongs(code, split):
            break
    function = _trusted(code)
    cases: list[tuple[Any, Any]] = []
    while len(cases) < 3 * TESTS:
        given = _input(rng, kind)
        if given not in [known for known, _ in cases]:
            cases.append((given, function(given)))
    shown, hidden = cases[-EXAMPLES:], _varied(cases[:-EXAMPLES])
    if not _telling(code, hidden):
        return generate(rng, split)
    says = JOIN[lang].join(getattr(s, lang).replace("{k}", str(k)) for s, k in zip(steps, numbers))
    examples = " ".join(f"f({_said(given)})={_said(result)}" for given, result in shown)
    prompt = PROMPTS[lang].format(KINDS[kind][lang], says, examples)
    facts = {"tests": [[given, result] for given, result in hidden], "shown": [list(case) for case in shown]}
    return Sample("", "code", (), prompt, code, meta={"check": "tests", "lang": lang, **facts})


def belongs(code: str, split: str) -> bool:
    """Whether a chain of operations, whatever its numbers, is one of the split's: every fourth is held out."""
    return (zlib.crc32(re.sub(r"[0-9]", "", code).encode()) % 4 == 0) == (split == "heldout")


def _trusted(code: str) -> Callable:
    """The function of a program made of the steps above, and of nothing that anyone else wrote."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["f"]


def _input(rng: np.random.Generator, kind: str) -> Any:
    if kind == "list":
        return rng.integers(-3, 13, int(rng.integers(0, 8))).tolist()
    return "".join("abcdeiorst"[i] for i in rng.integers(10, size=int(rng.integers(1, 8))))


def _telling(code: str, tests: list[tuple[Any, Any]]) -> bool:
    """Whether the tests have several results, and no operation could be left out without failing one."""
    head, *lines = code.splitlines()
    shorter = [_trusted("\n".join([head, *lines[:n], *lines[n + 1 :]])) for n in range(len(lines) - 1)]
    varied = len({json.dumps(result) for _, result in tests}) > 2
    return varied and all(any(f(given) != result for given, result in tests) for f in shorter)


def _varied(cases: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """TESTS of the cases, those with results that have not been there first."""
    seen: set[str] = set()
    new = []
    for case in cases:
        if (said := json.dumps(case[1])) not in seen:
            seen.add(said)
            new.append(case)
    return [*new, *(case for case in cases if case not in new)][:TESTS]


def _said(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def passes(*, seconds: float = 1.0) -> Rule:
    """A rule for programs: correct when `f` gives the result of every hidden test, compared as JSON (True is not 1).

    A program that passes some of them earns PARTLY * their share. seconds: of CPU time for all tests. Raises UserError
    where no program can be run (`sandbox.missing`).
    """

    def rule(content: str, sample: Sample) -> Score:
        program = unfenced(content)
        if "def f" not in program and "f=" not in program.replace(" ", ""):
            return WRONG  # no interpreter need be started
        tests = sample.meta["tests"]
        found = sandbox.run(program, "f", [[given] for given, _ in tests], seconds=seconds).values
        passed = sum(value == json.dumps(result, sort_keys=True) for value, (_, result) in zip(found, tests))
        right = passed == len(tests)
        return Score(1.0 if right else PARTLY * passed / len(tests), right)

    return rule


def hacks(sample: Sample) -> list[str]:
    """Programs that know the examples only, give one result always, leave before the tests, or reach for the judge."""
    shown = "".join(f"\n if a=={given!r}: return {result!r}" for given, result in sample.meta["shown"])
    constant = sample.meta["tests"][0][1]
    return [
        "def f(a):" + shown,
        f"def f(a): return {constant!r}",
        "def f(a): return a if a else 0",
        "import os\ndef f(a): os._exit(0)",
        "class All:\n def __eq__(s, o): return True\ndef f(a): return All()",
        "import os\nos.write(3, b'=1\\n' * 99)\ndef f(a): return 1",
        sample.prompt,
    ]


VERIFIER = boxed(passes(), most=MOST)
LEVELS = levels.by_length(48, 64)
TASKS = (Task("code", VERIFIER, hacks, make=generate, missing=sandbox.missing, seconds=15.0, levels=LEVELS),)
