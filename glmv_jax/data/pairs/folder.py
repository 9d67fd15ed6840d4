"""A folder of pictures, however deep. Texts lie beside them in files of the same stem (cat.jpg, cat.txt, cat.json,
cat.en.txt, cat.zh.txt), or all in one table at the top:

    captions.tsv     picture <tab> caption, or with a first line of names: file, caption, en, zh ...
    captions.jsonl   one JSON object a line, with the picture's name in "file", "file_name" or "image"

or metadata.jsonl, of the same form. Only the pictures that a table names are read; one may have several lines.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glmv_jax.data.files import pictures
from glmv_jax.data.pairs.fields import Record, from_json
from glmv_jax.data.pairs.reader import Reader
from glmv_jax.data.pairs.webdataset import sample
from glmv_jax.typing import UserError

TABLES = ("captions.tsv", "captions.jsonl", "metadata.jsonl")
_NAMES = ("file", "file_name", "filename", "image", "path")


class Folder(Reader):
    """Pairs of one folder; `files` is [its path]."""

    kind = "folder"

    def _counts(self) -> list[int]:
        self._path = os.path.expanduser(self.files[0])
        table = next((name for name in TABLES if os.path.exists(os.path.join(self._path, name))), None)
        self._beside: dict[str, list[str]] = {}
        self._rows: list[tuple[str, Record]] = []
        if table:
            self._rows = list(_lines(Path(self._path) / table))
        else:
            names, others = pictures(self._path)
            self._rows = [(name, {}) for name in sorted(names)]
            self._beside = {os.path.splitext(name)[0]: [] for name in names}
            for name in others:
                stem = _stem(name, self._beside)
                if stem:
                    self._beside[stem].append(name)
        return [len(self._rows)]

    def _read(self, file: int, row: int, picture: bool) -> Record:
        name, fields = self._rows[row]
        stem = os.path.splitext(name)[0]
        files = {n[len(stem) + 1 :].lower(): self._content(n) for n in self._beside.get(stem, ())}
        if picture:
            files["image"] = self._content(name)
        return {**{k: v for k, v in fields.items() if k not in _NAMES}, **sample(files)}

    def id(self, i: int) -> str:
        _, row = self.locate(i)
        return self._rows[row][0]

    def per_file(self, what: str, of_file: Callable[[int], np.ndarray]) -> np.ndarray:
        return of_file(0)  # a folder's own time says nothing of its files': not kept

    def _content(self, name: str) -> bytes:
        return Path(self._path, name).read_bytes()


def _stem(name: str, known: Collection[str]) -> str:
    """The name of the picture that a file lies beside, without its extension; "" when there is none."""
    while (shorter := os.path.splitext(name)[0]) != name:
        name = shorter
        if name in known:
            return name
    return ""


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(picture, fields) of each line of a table."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            rows: Iterator[dict[str, Any]] = (from_json(line.encode()) for line in file if line.strip())
        else:
            lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(lines, [])
            if not set(_NAMES) & set(header):
                names = ["file", "caption"]
                first = [header] if header else []
            else:
                names, first = header, []
            rows = (dict(zip(names, line)) for line in [*first, *lines])
        for n, row in enumerate(rows, start=1):
            name = next((row[key] for key in _NAMES if isinstance(row.get(key), str)), None)
            if not name:
                raise UserError(f"{path}: record {n} names no picture; give its name as 'file'")
            yield name, row


