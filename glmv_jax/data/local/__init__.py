"""Documents and conversations in a person's own files, as sources of stages 3 and 4.

What a record may say is in `schema`; how it becomes tokens and patches, in `assembling`. A source is configured by its
name, in `data.sources`, with the keys of `Source`:

    pages = {"path": "/data/pages-{000..127}.jsonl", "weight": 3.0, "category": "ocr"}
    chats = {"path": "/data/chats", "reader": "parquet", "long": "drop"}
    icons = {"path": "/usr/share/icons", "reader": "icons"}

The reader is told from the path where it can be.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.config import nearest
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.local.readers import Documents, Everything
from glmv_jax.data.pairs import balance
from glmv_jax.data.tars import expand
from glmv_jax.typing import UserError

# reader -> (its module and class, what its files are called)
READERS = {
    "jsonl": ("readers:Jsonl", "*.jsonl"),
    "parquet": ("readers:ParquetDocuments", "*.parquet"),
    "tar": ("readers:TarDocuments", "*.tar"),
    "icons": ("icons:Icons", ""),
}
LONG = ("split", "cut", "drop")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents and conversations come from.

    path:     a file, a folder, a pattern ("a-*.jsonl", "a-{000..127}.tar").
    reader:   one of READERS; "": told from the path.
    weight:   how often it is read beside the other sources (see `pipeline.shares`).
    category: only its records of this category; "" for all.
    long:     what is done with a record that is longer than a row, see `assembling`; one of LONG.
    """

    path: str
    reader: str = ""
    weight: float = 1.0
    category: str = ""
    long: str = "split"

    @staticmethod
    def of(name: str, entry: Mapping[str, Any]) -> Source:
        """From a config's entry. UserError: an unknown key, no path, a value that is none of the choices."""
        known = [field.name for field in dataclasses.fields(Source)]
        for key in entry:
            if key not in known:
                raise UserError(f"data.sources.{name} has no key {key!r}{nearest(key, known)}")
        if not entry.get("path"):
            raise UserError(f"data.sources.{name}.path is empty; give a file, a folder or a pattern")
        source = Source(**entry)
        if not source.weight > 0:
            raise UserError(f"data.sources.{name}.weight={source.weight} must be above 0; take the source out instead")
        for key, choices in {"reader": ("", *READERS), "long": LONG}.items():
            if getattr(source, key) not in choices:
                raise UserError(f"data.sources.{name}.{key}={getattr(source, key)!r} is not known; "
                                f"choose {', '.join(filter(None, choices))}")
        return dataclasses.replace(source, reader=source.reader or _told(name, source.path))

    def files(self) -> list[str]:
        """The files of all its records, in order. UserError: there is none."""
        pattern = READERS[self.reader][1]
        if pattern:
            return expand(self.path, pattern)
        if not os.path.isdir(os.path.expanduser(self.path)):
            raise UserError(f"{self.path}: no such folder")
        return [self.path]

    def open(self, files: Sequence[str], name: str, log: FaultLog | None = None, cache: str | None = None
             ) -> Documents:
        """The records in some of its files. UserError: there is none."""
        module, _, reader = READERS[self.reader][0].partition(":")
        cls = getattr(importlib.import_module(f"glmv_jax.data.local.{module}"), reader)
        return cls(files, Everything(), name=name, log=log, cache=cache)

    def rows(self, reader: Documents) -> np.ndarray:
        """Numbers of the records that are its own. UserError: none has its category."""
        if not self.category:
            return np.arange(len(reader))
        rows = np.flatnonzero(reader.of_category(self.category))
        if not len(rows):
            raise UserError(f"source {reader.name!r}: none of {len(reader)} records has the category "
                            f"{self.category!r}; correct data.sources.{reader.name}.category")
        return rows


def _told(name: str, path: str) -> str:
    """The reader that a path's name, or what lies in the folder, says."""
    text = os.path.expanduser(path)
    names = os.listdir(text) if os.path.isdir(text) else [os.path.basename(text)]
    found = {reader for reader in ("jsonl", "parquet", "tar") if any(n.endswith(f".{reader}") for n in names)}
    if "jsonl" in found:  # tars beside it hold its pictures
        found.discard("tar")
    if len(found) != 1:
        what = f"holds {' and '.join(sorted(found))}" if found else "says no reader"
        raise UserError(f"data.sources.{name}: {path} {what}; set data.sources.{name}.reader: {', '.join(READERS)}")
    return found.pop()


def opened(sources: Mapping[str, Source], shard: int, shards: int, log: FaultLog, cache: str | None = None
           ) -> dict[str, tuple[Documents, np.ndarray]]:
    """Of each source what reads this host's files, and the records of those that this host reads."""
    found = {}
    for name, (source, reader, part) in balance.opened(sources, shard, shards, log, cache).items():
        rows = source.rows(reader)
        rows = rows[balance.dealt(len(rows), part)]
        if not len(rows):
            raise UserError(f"source {name!r} has too few records for so many hosts; use fewer")
        found[name] = reader, rows
    return found
