"""TEDS, the similarity of tables as trees (Zhong et al., arXiv 1911.10683, section 5), and the rule that pays it.

A table is a tree of ("table", rows), ("tr", cells), ("td", spans, text); the similarity of two is
1 - edit distance / size of the larger. Inserting or deleting a node costs 1; renaming costs 0 for equal tags that are
no cells, 1 for different tags or spans, and for cells of equal spans the normalised edit distance of their texts.
"""

from __future__ import annotations

import dataclasses
import html
import re
import unicodedata

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.grade import WRONG, Rule, Score
from glmv_jax.rl.rewards.text import similarity

TAG = re.compile(r"<(/?)(table|thead|tbody|tr|td|th)((?:\s[^<>]*)?)>", re.IGNORECASE)
SPAN = re.compile(r"""\b(colspan|rowspan)\s*=\s*["']?(\d{1,3})\b""", re.IGNORECASE)
PARENT = {"table": "", "tr": "table", "td": "tr"}
IGNORED = ("thead", "tbody")  # a header is a row like any other


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a table's tree. spans: (columns, rows) that a cell takes; text: of a cell, spaces made one."""

    tag: str
    children: tuple[Node, ...] = ()
    spans: tuple[int, int] = (1, 1)
    text: str = ""


def parse(content: str) -> Node | None:
    """The one table that the text is as a whole, in HTML; None for anything else. `th` counts as `td`.

    Strict, because every answer here was asked for as a table: tags must nest, cells hold text alone, and nothing may
    stand outside of cells.
    """
    stack: list[tuple[str, tuple[int, int], list[Node]]] = [("", (1, 1), [])]
    end, text = 0, ""
    for match in TAG.finditer(content):
        closing, tag, attributes = match[1], match[2].lower(), match[3]
        tag = "td" if tag == "th" else tag
        between, end = content[end : match.start()], match.end()
        if stack[-1][0] == "td":
            text += between
        elif between.strip():
            return None
        if tag in IGNORED and stack[-1][0] == "table":
            continue
        if closing:
            if stack[-1][0] != tag:
                return None
            _, spans, children = stack.pop()
            if "<" in text or ">" in text:
                return None
            words = unicodedata.normalize("NFKC", html.unescape(text)).split() if tag == "td" else []
            stack[-1][2].append(Node(tag, tuple(children), spans, " ".join(words)))
        else:
            if PARENT.get(tag) != stack[-1][0]:
                return None
            found = {name.lower(): max(1, int(count)) for name, count in SPAN.findall(attributes)}
            stack.append((tag, (found.get("colspan", 1), found.get("rowspan", 1)), []))
            text = ""
    tables = stack[0][2]
    return tables[0] if len(stack) == 1 and len(tables) == 1 and not content[end:].strip() else None


def renaming(a: Node, b: Node) -> float:
    """What it costs to turn the node `a` into `b`, their children left out."""
    if a.tag != b.tag or a.spans != b.spans:
        return 1.0
    return 1.0 - similarity(a.text, b.text)


def _postorder(root: Node) -> tuple[list[Node], list[int], list[int]]:
    """Nodes in post-order, the number of the leftmost leaf under each, and the key roots, rising."""
    nodes: list[Node] = []
    leftmost: list[int] = []

    def visit(node: Node) -> int:
        first = [visit(child) for child in node.children]
        nodes.append(node)
        leftmost.append(first[0] if first else len(nodes) - 1)
        return leftmost[-1]

    visit(root)
    return nodes, leftmost, sorted({left: i for i, left in enumerate(leftmost)}.values())


def tree_distance(a: Node, b: Node) -> float:
    """Edit distance of two ordered trees: Zhang and Shasha, SIAM J. Comput. 18(6), 1989."""
    (nodes_a, left_a, roots_a), (nodes_b, left_b, roots_b) = _postorder(a), _postorder(b)
    cost = [[renaming(x, y) for y in nodes_b] for x in nodes_a]
    tree = [[0.0] * len(nodes_b) for _ in nodes_a]
    for i in roots_a:
        for j in roots_b:
            # forest[x][y]: between the nodes left_a[i]..left_a[i]+x-1 and left_b[j]..left_b[j]+y-1.
            first_a, first_b = left_a[i], left_b[j]
            rows, columns = i - first_a + 2, j - first_b + 2
            forest = [[float(x + y) for y in range(columns)] for x in range(rows)]
            for x in range(1, rows):
                for y in range(1, columns):
                    m, n = first_a + x - 1, first_b + y - 1
                    gone = min(forest[x - 1][y], forest[x][y - 1]) + 1.0
                    if left_a[m] == first_a and left_b[n] == first_b:
                        forest[x][y] = tree[m][n] = min(gone, forest[x - 1][y - 1] + cost[m][n])
                    else:
                        before = forest[left_a[m] - first_a][left_b[n] - first_b]
                        forest[x][y] = min(gone, before + tree[m][n])
    return tree[-1][-1]


def size(node: Node) -> int:
    """Nodes of a tree."""
    return 1 + sum(map(size, node.children))


def teds(a: Node, b: Node) -> float:
    """Similarity of two tables in [0, 1]; 1 for equal ones."""
    return 1.0 - tree_distance(a, b) / max(size(a), size(b))


def table() -> Rule:
    """A rule for tables: the value is TEDS against the gold table, correct when the two are equal.

    A content that is no single table of HTML, or has more than four times the nodes of the gold one, is wrong.
    """

    def rule(content: str, sample: Sample) -> Score:
        gold, found = parse(sample.answer), parse(content)
        if gold is None:
            raise ValueError(f"sample {sample.id}: the gold answer {sample.answer!r} is no table")
        if found is None or size(found) > 4 * size(gold):
            return WRONG
        return Score(1.0, True) if found == gold else Score(max(0.0, teds(found, gold)), False)

    return rule
