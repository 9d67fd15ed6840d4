"""Formulas in LaTeX: one canonical spelling, so that what looks the same is the same, and the rule that pays it.

What is unified: white space and spacing commands, \\left and \\right, \\dfrac and \\tfrac, braces round a single symbol
(x^2 and x^{2}), the order of sub- and superscripts, dollar signs and \\( \\) round the whole. Not unified is what looks
different: the order of a sum, \\frac against /.
"""

from __future__ import annotations

import re

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score
from glmv_jax.rl.rewards.text import edit_distance

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\S")
DEEPEST = 12  # of braces in braces: no formula that is asked for comes near
DROPPED = {
    *(r"\left", r"\right", r"\displaystyle", r"\textstyle", r"\limits", r"\quad", r"\qquad"),
    *(r"\,", r"\;", r"\:", r"\!", r"\ ", "~"),
}
SAME = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\ast": "*", r"\lbrack": "[", r"\rbrack": "]"}
WRAPPED = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
ARGUMENTS = {r"\frac": 2, r"\sqrt": 1}


def canonical(latex: str) -> list[str] | None:
    """The tokens of the formula in its one spelling; None where braces or arguments do not fit, or nothing is left."""
    text = latex.strip()
    for before, after in WRAPPED:
        if text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after):
            text = text[len(before) : len(text) - len(after)]
            break
    tokens = [SAME.get(token, token) for token in TOKEN.findall(text) if token not in DROPPED]
    try:
        out, rest = _row(tokens, 0, 0)
    except ValueError:
        return None
    return out if out and rest == len(tokens) else None


def _row(tokens: list[str], i: int, depth: int) -> tuple[list[str], int]:
    """Canonical tokens from tokens[i] up to an unopened closing brace or the end, and the number of what follows."""
    out: list[str] = []
    while i < len(tokens) and tokens[i] != "}":
        token = tokens[i]
        if token in ("_", "^"):
            raise ValueError("a script without a base")
        base, i = _argument(tokens, i, depth)
        scripts: dict[str, list[str]] = {}
        while i < len(tokens) and tokens[i] in ("_", "^"):
            kind = tokens[i]
            if kind in scripts:
                raise ValueError("two scripts of a kind")
            scripts[kind], i = _argument(tokens, i + 1, depth)
        out += base
        for kind in ("_", "^"):
            if kind in scripts:
                out += [kind, "{", *scripts[kind], "}"]
    return out, i


def _argument(tokens: list[str], i: int, depth: int) -> tuple[list[str], int]:
    """Canonical tokens of what stands at i: a group in braces (which are dropped), a command with its arguments, or a
    symbol."""
    if i >= len(tokens) or tokens[i] in ("}", "_", "^") or depth > DEEPEST:
        raise ValueError("an argument is missing, or too deep")
    token = tokens[i]
    if token == "{":
        inner, i = _row(tokens, i + 1, depth + 1)
        if i >= len(tokens) or not inner:
            raise ValueError("a brace is not closed, or holds nothing")
        return inner, i + 1
    out, i = [token], i + 1
    for _ in range(ARGUMENTS.get(token, 0)):
        inner, i = _argument(tokens, i, depth + 1)
        out += ["{", *inner, "}"]
    return out, i


def formula() -> Rule:
    """A rule for formula recognition: correct when the canonical tokens equal those of the gold formula.

    The value is 1 - edit distance in tokens / the longer length, as in reading; what is no LaTeX earns nothing.
    """

    def rule(content: str, sample: Sample) -> Score:
        gold, found = canonical(sample.answer), canonical(content)
        if gold is None:
            raise ValueError(f"sample {sample.id}: the gold answer {sample.answer!r} is no formula")
        if found is None or len(found) > 4 * len(gold) + 16:
            return WRONG
        value = 1.0 - edit_distance(found, gold) / max(len(found), len(gold))
        return Score(value, found == gold)

    return rule
