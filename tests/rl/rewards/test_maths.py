"""Equality of expressions, and the answers a policy would write to be equal to anything.

The rule is called here in this process, on contents that are known to be harmless; test_system has the others.
"""

from __future__ import annotations

import pytest

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.maths import maths

RULE = maths()


def right(content: str, gold: str, **meta) -> bool:
    found = RULE(content, Sample("s/0", "s", (), "?", gold, meta=meta))
    assert found.value == float(found.correct)
    return found.correct


@pytest.mark.parametrize(("gold", "content"), [
    ("391", "391"), ("391", "391.0"), ("391", "$391$"), ("391", "x = 391"), ("1234", "1,234"), ("391", "391."),
    ("0.5", "\\frac{1}{2}"), ("1/2", "0.5"), ("\\frac{3}{4}", "\\dfrac{6}{8}"), ("\\frac{3}{4}", "3/4"),
    ("-2", "\\boxed{-2}"), ("2\\sqrt{3}", "\\sqrt{12}"), ("\\sqrt{12}", "\\(2\\sqrt{3}\\)"),
    ("\\frac{\\pi}{2}", "\\pi/2"),
    ("x^2+2x+1", "(x+1)^2"), ("(x-1)(x+1)", "x^2-1"), ("2x+y", "y+2x"), ("\\{1,2\\}", "\\{2,1\\}"), ("(1,2)", "(1, 2)"),
    ("x=3", "x = 3"),
])  # fmt: skip
def test_equal(gold, content):
    assert right(content, gold)


@pytest.mark.parametrize(("gold", "content"), [
    ("391", "390"), ("391", "-391"), ("391", "17*23"), ("391", "17 \\cdot 23"), ("391", "17\\times23"),
    ("391", "400-9"),
    ("391", "782/2"), ("391", "\\frac{782}{2}"), ("391", "390 or 391"), ("391", "390, 391"), ("391", "391 390"),
    ("391", "$390$ $391$"), ("391", "$390$ and $391$"), ("391", "x=390=391"), ("391", "390=391"), ("391", "391\n390"),
    ("391", "\\boxed{390}\\boxed{391}"), ("391", "the number asked for"), ("391", "x"), ("391", "\\infty"), ("391", ""),
    ("391", "x \\in \\mathbb{R}"), ("391", "\\sum_{i=1}^{391} 1"), ("5", "\\sqrt{25}"), ("6", "3!"),
    ("\\frac{3}{4}", "3:4"),
    ("\\frac{3}{4}", "1-\\frac{1}{4}"), ("(1,2)", "(2,1)"), ("(1,2)", "1,2,3"), ("x^2-1", "(x-1)(x+1)"), ("x", "y"),
    ("2\\sqrt{3}", "2\\sqrt{3} or 1"), ("2\\sqrt{3}", "3.46"), ("\\log 2", "\\ln 2 + 0"), ("x=3", "x=4"),
    ("x=3", "3=x=3"),
    ("\\pi", "3.14"), ("0", "nan"), ("0", "\\text{nothing}"), ("1", "true"), ("1", "1e0"),
])  # fmt: skip
def test_not_equal_or_not_worked_out(gold, content):
    assert not right(content, gold)


def test_aliases_and_unworked_answers():
    assert right("12 \\text{ cm}", "0.12", aliases=["12 \\text{ cm}"])
    loose = maths(worked_out=False)
    assert loose("17*23", Sample("s/0", "s", (), "?", "391")).correct
    assert not loose("17*24", Sample("s/0", "s", (), "?", "391")).correct
