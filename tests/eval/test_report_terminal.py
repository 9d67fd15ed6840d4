"""Tables at the widths of terminals: every number whole, in its column, whatever the width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from glmv_jax.eval import report_terminal
from glmv_jax.eval.report_tables import Cell, Table

HEADER = ["stage", "time", "share", "FLOPs", "share", "FLOP/s", "goodput", "samples", "tokens", "shuffled images"]
STAGES = ("teacher", "pretrain", "sft_more")
VALUES = ["13 min 05 s", "79%", "45.6T", "14%", "58.1G", "88%", "12.3k", "12.3M", "0.250"]


def printed(content: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    report_terminal.show(content, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width, parts", [(120, 1), (80, 1), (60, 2), (40, 3)])
def test_numbers_are_whole_at_any_width(width, parts):
    rows = [[Cell(stage, "head"), *map(Cell, VALUES)] for stage in STAGES]
    lines = printed(Table("Time and arithmetic", HEADER, rows, "A note."), width)
    assert max(map(len, lines)) <= width
    for stage in STAGES:
        told = [line.split(maxsplit=1)[1] for line in lines if line.strip().startswith(stage)]
        assert len(told) == parts and re.split(r"\s+", " ".join(told).strip()) == " ".join(VALUES).split()
    assert len([line for line in lines if re.match(r"\s*stage\b", line)]) == parts and lines[-1] == "A note."


def test_words_are_folded_before_a_table_comes_apart():
    words = "a long metric's name, image -> English name R@5"
    rows = [[Cell("siglip"), Cell(words), Cell("0.006"), Cell("0.059")]]
    lines = printed(Table("t", ["stage", "metric", "untrained", "trained"], rows, kind="results"), 50)
    assert sum("stage" in line for line in lines) == 1 and any(re.search(r"0\.006 +0\.059", line) for line in lines)
    assert " ".join(" ".join(lines).replace("siglip", "").split()).count("image") == 1
