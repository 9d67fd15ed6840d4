"""Formulas that look the same are the same, others are not; what the task draws is what it says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import formulas
from glmv_jax.rl.rewards.formulas import canonical
from glmv_jax.rl.tasks import formula


@pytest.mark.parametrize("spellings", [
    (r"\frac{a}{b}", r"\frac ab", r"\dfrac{a}{b}", r" \frac { a } { b } ", r"$\frac{a}{b}$", r"\(\frac{a}{b}\)"),
    (r"\frac{a}{b}", r"\frac{{a}}b"),
    ("x^{2}", "x^2", "{x}^{2}", "x ^ 2"),
    ("(a+b)^2", r"\left(a+b\right)^{2}", "( a + b )^2"),
    ("x_{1}^{2}", "x_1^2", "x^2_1"),
    (r"\sqrt{y}+1", r"\sqrt y + 1", r"\sqrt{y}\,+\;1", r"\displaystyle\sqrt{y}+1", "$$\\sqrt y+1$$"),
])  # fmt: skip
def test_spellings_of_one_formula(spellings):
    assert len({tuple(canonical(s)) for s in spellings}) == 1


def test_formulas_that_look_different():
    forms = (r"\frac{a}{b}", r"\frac{b}{a}", "a/b", "ab", "x^{2}", "x_{2}", "x2", "x^{12}", "x^12", r"\sqrt{x+1}",
             r"\sqrt{x}+1", "x+y", "y+x", "X+y")  # fmt: skip
    assert len({tuple(canonical(form)) for form in forms}) == len(forms)


@pytest.mark.parametrize("broken", [
    "", " ", "$$", "{", "}", "x^", "^2", "x^{", r"\frac{a}", r"\frac", "x^2^3", "x_1_2", "x^{}", r"\sqrt", "{}", "a}",
    "{" * 40 + "a" + "}" * 40,
])  # fmt: skip
def test_what_is_no_formula(broken):
    assert canonical(broken) is None


def test_rule():
    rule, sample = formulas.formula(), Sample("f/0", "f", (), "?", r"x^{2}+\frac{a}{b}")
    assert rule(r"x^2 + \frac ab", sample) == (1.0, True)
    value, correct = rule(r"x^{3}+\frac{a}{b}", sample)
    assert not correct and value == pytest.approx(1 - 1 / len(canonical(sample.answer)))
    assert rule(r"x^2+\frac{a", sample) == (0.0, False)


def test_what_is_drawn_has_the_parts_of_what_is_said():
    """Symbols, bars and roots of the layout are those of the LaTeX, none outside the picture, none over another."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        node = formula.formula(rng)
        laid, latex = formula.lay(node, 14, "latin-1.ttf"), formula.latex(node)
        texts = [mark for mark in laid.marks if not isinstance(mark[0], tuple)]
        lines = [mark for mark in laid.marks if isinstance(mark[0], tuple)]
        symbols = latex.replace(r"\frac", "").replace(r"\sqrt", "").translate(str.maketrans("", "", "{}^_"))
        assert sorted("".join(mark[2] for mark in texts)) == sorted(symbols)
        assert len(lines) == latex.count(r"\frac") + latex.count(r"\sqrt")
        boxes = [(x, y - 0.5 * size, x + 0.5 * size, y) for x, y, _, size in texts]
        for x1, y1, x2, y2 in boxes:
            assert x1 >= 0 and x2 <= laid.width + 1 and -y1 <= laid.above and y2 <= laid.below + 1, latex
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] or b[3] <= a[1], latex
