"""Texts out of a user's files, one after another, never a whole file in memory.

    .txt, others   a text a line
    .jsonl         an object a line; texts, or lists of them, under the names of FIELDS, or under `field` alone
    .tsv, .csv     the columns that the first line calls by a name of FIELDS, or the column `field` (a name or a number
                   from 1; then the first line is a row like any other)
    .gz            any of these, compressed
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from glmv_jax.typing import UserError

FIELDS = ("txt", "caption", "captions", "text", "texts", "sentences", "raw", "alt_text", "alt", "title",
          "en", "zh", "caption_en", "caption_zh", "text_en", "text_zh")  # fmt: skip
ENDINGS = (".txt", ".jsonl", ".tsv", ".csv")
LONGEST = 2000  # characters: a longer text counts as several


@dataclasses.dataclass
class Texts:
    """Iterable over the texts of files and of folders (all of ENDINGS below them), in the order of their names.

    skipped: lines without a text that could be read, of the last time through.   field: see above, "" for FIELDS.
    Raises: UserError for a path that is not there, a folder without such files, and a table whose texts are not found.
    """

    paths: Iterable[str | pathlib.Path]
    field: str = ""
    skipped: int = 0

    def __iter__(self) -> Iterator[str]:
        self.skipped = 0
        for path in _files(self.paths):
            kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
            read = {".jsonl": self._objects, ".tsv": self._table, ".csv": self._table}.get(kind, self._lines)
            opened = gzip.open if path.suffix == ".gz" else open
            try:
                with opened(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
                    for text in read(path, file):
                        yield from _pieces(text)
            except (OSError, EOFError, csv.Error) as error:
                raise UserError(f"{path} cannot be read ({error}); leave it out or copy it again") from None

    def _lines(self, path: pathlib.Path, file: TextIO) -> Iterator[str]:
        return iter(file)

    def _objects(self, path: pathlib.Path, file: TextIO) -> Iterator[str]:
        names = (self.field,) if self.field else FIELDS
        for line in file:
            try:
                record = json.loads(line)
                found = [text for name in names for text in _strings(record.get(name))]
            except (ValueError, AttributeError):
                found = []
            self.skipped += not found
            yield from found

    def _table(self, path: pathlib.Path, file: TextIO) -> Iterator[str]:
        if ".tsv" in path.suffixes:  # no quotes there: a lone one would swallow what follows
            rows = (line.rstrip("\r\n").split("\t") for line in file)
        else:
            csv.field_size_limit(1 << 27)  # pictures may stand in another column
            rows = csv.reader(file)
        first = next(rows, None)
        if first is None:
            return
        if self.field.isdecimal():
            columns, rows = [int(self.field) - 1], itertools.chain([first], rows)
        else:
            columns = [i for i, name in enumerate(first) if name in ((self.field,) if self.field else FIELDS)]
        if not columns or not 0 <= columns[0] < len(first):
            raise UserError(f"{path}: no column {self.field or 'of a known name'} among {', '.join(first)[:200]}; give "
                            "--field the name of one, or its number from 1")  # fmt: skip
        for row in rows:
            found = [row[i] for i in columns if i < len(row) and row[i].strip()]
            self.skipped += not found
            yield from found


def _files(paths: Iterable[str | pathlib.Path]) -> Iterator[pathlib.Path]:
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise UserError(f"--text {path} does not exist; check the path")
        if not path.is_dir():
            yield path
            continue
        found = False
        for folder, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                if name.removesuffix(".gz").endswith(ENDINGS):
                    found = True
                    yield pathlib.Path(folder, name)
        if not found:
            raise UserError(f"--text {path}: no {', '.join(ENDINGS)} in this folder; give files")


def _strings(value: Any) -> list[str]:
    """Texts in a value of JSON; ValueError for another type."""
    if isinstance(value, str):
        return [value]
    if value is None:
        return []
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    raise ValueError(f"{type(value).__name__} is no text")


def _pieces(text: str) -> Iterator[str]:
    """The lines of a text without what surrounds them; very long ones in parts."""
    for line in text.split("\n"):
        line = line.strip()
        yield from (line[i : i + LONGEST] for i in range(0, len(line), LONGEST))
