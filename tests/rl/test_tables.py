"""TEDS against the definition of the tree edit distance, and what counts as one table."""

from __future__ import annotations

import functools
import random

import pytest

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import tables
from glmv_jax.rl.rewards.tables import Node, parse, renaming, teds, tree_distance


def random_tree(rng: random.Random, nodes: int) -> Node:
    """Any ordered tree, not only such as tables are: the distance knows nothing of tables."""
    tag, text = rng.choice(("tr", "td")), rng.choice(("", "a", "ab", "12", "129"))
    spans = (rng.choice((1, 1, 2)), 1)
    children, left = [], nodes - 1
    while left > 0:
        part = rng.randint(1, left)
        children.append(random_tree(rng, part))
        left -= part
    return Node(tag, tuple(children), spans, text if tag == "td" else "")


def slow_distance(a: Node, b: Node) -> float:
    """The definition by recursion on forests: the last root of either is deleted, or both are matched."""

    @functools.cache
    def between(f: tuple[Node, ...], g: tuple[Node, ...]) -> float:
        if not f and not g:
            return 0.0
        found = []
        if f:
            found.append(between(f[:-1] + f[-1].children, g) + 1)
        if g:
            found.append(between(f, g[:-1] + g[-1].children) + 1)
        if f and g:
            x, y = f[-1], g[-1]
            found.append(between(f[:-1], g[:-1]) + between(x.children, y.children) + renaming(x, y))
        return min(found)

    return between((a,), (b,))


def test_distance_is_that_of_the_definition():
    rng = random.Random(0)
    for _ in range(150):
        a, b = random_tree(rng, rng.randint(1, 8)), random_tree(rng, rng.randint(1, 8))
        assert tree_distance(a, b) == pytest.approx(slow_distance(a, b), abs=1e-9)


def test_distance_is_a_metric():
    rng = random.Random(1)
    for _ in range(60):
        a, b, c = (random_tree(rng, rng.randint(1, 12)) for _ in range(3))
        ab, bc, ac = tree_distance(a, b), tree_distance(b, c), tree_distance(a, c)
        assert ab == pytest.approx(tree_distance(b, a)) and tree_distance(a, a) == 0
        assert (ab == 0) == (a == b) and ac <= ab + bc + 1e-9


def table(*rows: str) -> Node:
    """ "a|b" -> cells."""
    inner = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row.split("|")) + "</tr>" for row in rows)
    return parse(f"<table>{inner}</table>")


def test_teds_of_known_tables():
    gold = table("a|b", "12|345")  # 7 nodes
    assert teds(gold, gold) == 1
    assert teds(table("a|b", "12|346"), gold) == pytest.approx(1 - (1 / 3) / 7)
    assert teds(table("a|b"), gold) == pytest.approx(1 - 3 / 7)
    assert teds(table("a|b", "12|345", "x|y"), gold) == pytest.approx(1 - 3 / 10)
    spanned = parse('<table><tr><td colspan="2">a</td><td>b</td></tr><tr><td>12</td><td>345</td></tr></table>')
    assert teds(spanned, gold) == pytest.approx(1 - 1 / 7)


@pytest.mark.parametrize("other", [
    "<table>\n <tr> <td>a</td>\n<td> b  c </td></tr>\n</table>",
    "<TABLE><TR><TD>a</TD><TD>b c</TD></TR></TABLE>",
    "<table border='1'><thead><tr><th>a</th><th>b c</th></tr></thead></table>",
    "<table><tbody><tr><td colspan=1>a</td><td rowspan='1'>b&nbsp;c</td></tr></tbody></table>",
])  # fmt: skip
def test_spellings_of_one_table(other):
    assert parse(other) == parse("<table><tr><td>a</td><td>b c</td></tr></table>") is not None


@pytest.mark.parametrize("broken", [
    "", "a|b", "<table>", "<table></tr></table>", "<table><td>a</td></table>", "<table><tr>a</tr></table>",
    "<table><tr><td>a</tr></table>", "<tr><td>a</td></tr>", "see <table></table>", "<table></table> or",
    "<table></table><table></table>", "<table><tr><td><table></table></td></tr></table>",
    "<table><tr><td>a<b></td></tr></table>", "<table><tr><td>a<</td></tr></table>", "</table><table>",
])  # fmt: skip
def test_what_is_no_table(broken):
    assert parse(broken) is None


def test_rule():
    sample = Sample("t/0", "t", (), "?", "<table><tr><td>a</td><td>b</td></tr><tr><td>12</td><td>345</td></tr></table>")
    rule = tables.table()
    assert rule(sample.answer.replace("><", "> <"), sample) == (1.0, True)
    value, correct = rule(sample.answer.replace("345", "346"), sample)
    assert value == pytest.approx(1 - 1 / 21) and not correct
    assert rule("<table>" + "<tr></tr>" * 40 + "</table>", sample) == (0.0, False)
    with pytest.raises(ValueError, match="t/0.*is no table"):
        rule("x", Sample("t/0", "t", (), "?", "a|b"))
