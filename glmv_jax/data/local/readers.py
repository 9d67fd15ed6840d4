"""Readers of a person's own files: item i is a `schema.Record`. Random access, so shuffled and resumed like any source.

They are the readers of stage 2 (`data.pairs`), whose records are read as documents. A record that cannot be read raises
when it is asked for; whoever asks counts it and goes on (`faults.Guarded`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmv_jax.data.cache import Arrays, cached
from glmv_jax.data.files import EXTENSIONS
from glmv_jax.data.local.schema import Fetch, Record, asked, parse
from glmv_jax.data.pairs.fields import from_json
from glmv_jax.data.pairs.folder import Folder
from glmv_jax.data.pairs.parquet import Parquet
from glmv_jax.data.pairs.reader import Reader
from glmv_jax.data.pairs.webdataset import WebDataset
from glmv_jax.data.tars import Tars
from glmv_jax.typing import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclasses.dataclass(frozen=True)
class Everything:
    """All fields of a record are read, or its category alone: `pairs.fields.Fields` for records that are no pairs."""

    def uses(self, name: str, picture: bool) -> bool:
        return picture or name == "category"


class Documents(Reader):
    """A reader whose items are documents and conversations.

    prompt: a question that documents are made the answers to, see `schema.asked`; "": none.
    """

    prompt = ""

    def __getitem__(self, i: int) -> Record:  # type: ignore[override]  # its records are no pairs
        file, row = self.locate(i)
        fields = self._read(file, row, True)
        record = parse(fields, self.id(i), self._fetch(file, fields))
        return asked(record, self.prompt) if self.prompt and not record.messages else record

    def _fetch(self, file: int, fields: Mapping[str, Any]) -> Fetch:
        folder = os.path.dirname(os.path.abspath(self.files[file]))
        return lambda name: _beside(folder, name)

    def of_category(self, category: str) -> np.ndarray:
        """Which records have this category: bool [records]. Reads all of them once; the result is kept."""

        def of_file(file: int) -> np.ndarray:
            start = self.start(file)
            return np.array([self._category(i) == category for i in range(start, start + self.counts[file])], bool)

        return self.per_file(f"category {category}", of_file)

    def _category(self, i: int) -> str:
        try:
            return str(self._read(*self.locate(i), False).get("category") or "")
        except UserError:
            return ""  # it is logged by whoever reads all categories


class Jsonl(Documents):
    """Files of one JSON object a line. Where each line begins is found once and kept."""

    kind = "jsonl"

    def _counts(self) -> list[int]:
        for path in self.files:
            if path.endswith(COMPRESSED):
                raise UserError(f"{path} is compressed, and records are read from its middle; decompress it first")
        self._lines = [cached(path, "jsonl", functools.partial(_lines, path), self.cache) for path in self.files]
        self._tars: dict[int, _Members | None] = {}
        return [len(lines["at"]) for lines in self._lines]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tars": {}}

    def _read(self, file: int, row: int, picture: bool) -> dict[str, Any]:
        with open(self.files[file], "rb") as lines:
            lines.seek(int(self._lines[file]["at"][row]))
            return from_json(lines.readline())

    def id(self, i: int) -> str:
        file, row = self.locate(i)
        return f"{Path(self.files[file]).name}:{self._lines[file]['number'][row]}"

    def _fetch(self, file: int, fields: Mapping[str, Any]) -> Fetch:
        on_disk = super()._fetch(file, fields)

        def fetch(name: str) -> bytes:
            if file not in self._tars:
                tar = os.path.splitext(self.files[file])[0] + ".tar"
                self._tars[file] = _Members(tar, self) if os.path.isfile(tar) else None
            tar_ = self._tars[file]
            found = None if tar_ is None else tar_.get(name)
            return on_disk(name) if found is None else found

        return fetch


class ParquetDocuments(Documents, Parquet):
    """Rows of parquet files; see `pairs.parquet` for how they are shuffled."""

    def _read(self, file: int, row: int, picture: bool) -> dict[str, Any]:
        return _without_none(super()._read(file, row, picture))


def _without_none(value: Any) -> Any:
    """Without fields that are null, however deep: each struct of a column has all the fields that any of them has."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value


class TarDocuments(Documents, WebDataset):
    """Samples of tar files, as WebDataset writes them: the .json is the record, or pictures and a .txt."""

    def _fetch(self, file: int, fields: Mapping[str, Any]) -> Fetch:
        def fetch(name: str) -> bytes:
            for key in (name.lower(), name.rpartition("/")[2].partition(".")[2].lower()):
                if isinstance(fields.get(key), bytes):
                    return fields[key]
            raise UserError(f"its sample has no file {name!r}, only {', '.join(sorted(_files(fields))) or 'none'}")

        return fetch

    def _read(self, file: int, row: int, picture: bool) -> dict[str, Any]:
        fields = dict(super()._read(file, row, picture))
        if picture and not {"segments", "messages", "text"} & fields.keys():
            pictures = [name for name in _files(fields) if name.rpartition(".")[2] in EXTENSIONS]
            fields |= {"images": pictures} | ({"text": fields["txt"]} if "txt" in fields else {})
            fields.pop("image", None)
        return fields


class FolderDocuments(Documents, Folder):
    """A folder of pictures with a text or a record (.json) beside each, or all in one table; see `pairs.folder`."""

    def _fetch(self, file: int, fields: Mapping[str, Any]) -> Fetch:
        return lambda name: _beside(self._path, name)

    def _read(self, file: int, row: int, picture: bool) -> dict[str, Any]:
        fields = dict(super()._read(file, row, picture))
        if said := next((name for name in ("text", "txt", "caption") if name in fields), None):
            return fields | {"text": fields[said]}
        if picture and not {"segments", "messages", "conversations"} & fields.keys():
            raise UserError("no text belongs to it; write one beside it, in a .txt of the same name")
        return fields


class _Members:
    """The files of a tar by name."""

    def __init__(self, path: str, reader: Reader) -> None:
        self._tars = Tars([path], reader.log, reader.cache)
        keys = (self._tars.id(i).partition("/")[2] for i in range(len(self._tars)))
        self._numbers = {key: i for i, key in enumerate(keys)}

    def get(self, name: str) -> bytes | None:
        folder, _, base = name.removeprefix("./").rpartition("/")
        stem, _, extension = base.partition(".")
        number = self._numbers.get(f"{folder}/{stem}".lstrip("/"))
        if number is None:
            return None
        return self._tars.read(number, {extension.lower()}).get(extension.lower())


def _files(fields: Mapping[str, Any]) -> list[str]:
    return [name for name, value in fields.items() if isinstance(value, bytes)]


def _beside(folder: str, name: str) -> bytes:
    try:
        return Path(folder, name).read_bytes()
    except OSError as error:
        raise UserError(f"its file {name!r} cannot be read ({error.strerror}); paths are relative to the file that "
                        "names them") from None


def _lines(path: str) -> tuple[Arrays, bool]:
    """Where each line that is not empty begins, and its number from 1."""
    at, numbers, position = [], [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                at.append(position)
                numbers.append(number)
            position += len(line)
    return {"at": np.array(at, np.int64), "number": np.array(numbers, np.int64)}, True
