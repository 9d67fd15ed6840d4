"""A rule for mathematics: equality of expressions by Math-Verify (extra "rl"), which parses LaTeX and asks SymPy.

Neither is bounded in time or memory, so this rule belongs in a worker (`pool`). Math-Verify takes the last thing in a
text that it can read for the answer; a policy would learn to write many. So the whole content has to be one expression,
and it has to be worked out: "17 * 23" is equal to 391, and no answer to what 17 * 23 is.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import text
from glmv_jax.rl.rewards.grade import RIGHT, WRONG, Rule, Score
from glmv_jax.typing import UserError

_DOLLARS = re.compile(r"\$\$?(?P<a>.*?)\$?\$|\\\((?P<b>.*)\\\)|\\\[(?P<c>.*)\\\]", re.DOTALL)
_ASSIGNED = re.compile(r"\\?[A-Za-z][A-Za-z_0-9{}]*\s*=(?!=)")
_FRACTION = re.compile(r"-?(?:\\[dt]?frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}|([0-9]+)/([0-9]+))")
# What is left to be worked out, by kind. Fractions, roots and powers are how exact results are written.
_WORK = {
    "sum": re.compile(r"(?<=[^\s({\[,^_=])\s*(?:[+-]|\\pm|\\mp)"),
    "product": re.compile(r"\*|\\(?:cdot|times|ast)\b|\\prod|[x×·]\s*[0-9(]|\)\s*\("),
    "division": re.compile(r"÷|\\div\b|:"),
    "series": re.compile(r"\\(?:sum|int|lim|binom)(?![a-z])|!"),
    "function": re.compile(r"\\(?:log|ln|exp|sin|cos|tan|gcd|max|min|lfloor|lceil|bmod|pmod)\b|log|floor|mod"),
    "alternative": re.compile(r"\b(?:or|and|not|either)\b|\\(?:vee|wedge|lor|land|text)|[;|?]|,"),
}  # fmt: skip


@functools.cache
def _library() -> tuple[Any, Any]:
    """(parse, verify) of math_verify, without its own time limits, which need signals and do not hold."""
    try:
        import math_verify
    except ImportError:
        raise UserError('the rule "maths" needs math-verify: pip install "glmv_jax[rl]"') from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    latex = [math_verify.LatexExtractionConfig()]

    def parse(content: str) -> list[Any]:
        return math_verify.parse(f"${content}$", latex, fallback_mode="no_fallback", parsing_timeout=None)

    return parse, functools.partial(math_verify.verify, timeout_seconds=None)


def maths(*, worked_out: bool = True) -> Rule:
    """A rule: right iff the content is one expression that equals the gold answer or one of meta["aliases"].

    worked_out: the content may hold no kind of operation (sum, product, series, function, "or", comma) that the gold
    answer does not; where the gold answer is a number, the content has to be a number or one fraction.
    Raises UserError without Math-Verify.
    """
    parse, verify = _library()
    parse("1")  # builds the parser's tables now, not inside the first answer's time limit

    def rule(content: str, sample: Sample) -> Score:
        content = _inside(content)
        if content is None:
            return WRONG
        for gold in (sample.answer, *sample.meta.get("aliases", ())):
            gold = _inside(gold) or gold
            if text.normalise(content) == text.normalise(gold):
                return RIGHT
            if worked_out and not _worked_out(content, gold):
                continue
            golds, found = parse(gold), parse(content)
            if len(golds) == len(found) == 1 and verify(golds, found):
                return RIGHT
        return WRONG

    return rule


def _inside(content: str) -> str | None:
    """The one expression of a content, without the marks of mathematics around it; None when there are several."""
    content = content.strip().removesuffix(".").strip()
    if match := _DOLLARS.fullmatch(content):
        content = next(group for group in match.groups() if group is not None).strip()
    if match := re.fullmatch(r"\\boxed\{(.*)\}", content, re.DOTALL):
        content = match[1].strip()
    held = any(mark in content for mark in ("$", "\\(", "\\[", "\\boxed", "\\fbox", "\n"))
    return None if held or content.count("=") > 1 or not content else content


def _worked_out(content: str, gold: str) -> bool:
    """Whether the content leaves no more to be done than the gold answer does."""
    if "=" in content and "=" not in gold:
        if not (match := _ASSIGNED.match(content)):
            return False
        content = content[match.end() :].strip()
    number = text.parse_number(gold)
    if number is not None or _FRACTION.fullmatch(gold):
        fraction = _FRACTION.fullmatch(content)
        if number is not None and number.is_integer() and fraction:
            return False  # 782/2 for 391
        return bool(fraction) or text.parse_number(content) is not None
    return not any(kind.search(content) and not kind.search(gold) for kind in _WORK.values())
