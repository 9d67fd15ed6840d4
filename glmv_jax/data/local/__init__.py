"""Documents and conversations in a person's own files, as sources of stages 3 and 4.

What a record may say is in `schema`; how it becomes tokens and patches, in `assembling`. A source is configured by its
name, in `data.sources`, with the keys of `Source`:

    pages = {"path": "/data/pages-{000..127}.jsonl", "weight": 3.0, "category": "ocr"}
    scans = {"path": "/data/scans", "prompt": "Text Recognition:"}         # a.png with a.txt, and so on
    chats = {"path": "/data/chats", "reader": "parquet", "long": "drop"}
    icons = {"path": "/usr/share/icons", "reader": "icons"}

The reader is told from the path where it can be.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from glmv_jax.data.faults import FaultLog
from glmv_jax.data.files import pictures
from glmv_jax.data.local.readers import Documents, Everything
from glmv_jax.data.pairs import balance
from glmv_jax.data.sources import FileSource, names_at
from glmv_jax.typing import UserError

LONG = ("split", "cut", "drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(FileSource):
    """Where documents and conversations come from; `path` and `weight` as any `FileSource` (see `pipeline.shares`).

    reader:   one of READERS; "": told from the path.
    category: only its records of this category; "" for all.
    long:     what is done with a record that is longer than a row, see `assembling`; one of LONG.
    prompt:   a question: pictures and their text become a conversation in which the text is the answer; "": they stay
              one document, all of whose text is learnt.
    """

    reader: str = ""
    category: str = ""
    long: str = "split"
    prompt: str = ""

    KIND = "reader"
    READERS = {
        "jsonl": ("local.readers:Jsonl", "*.jsonl"),
        "parquet": ("local.readers:ParquetDocuments", "*.parquet"),
        "tar": ("local.readers:TarDocuments", "*.tar"),
        "icons": ("local.icons:Icons", ""),
        "folder": ("local.readers:FolderDocuments", ""),
    }
    CHOICES = {"long": LONG}

    @classmethod
    def told(cls, name: str, path: str) -> str:
        names = names_at(path)
        found = {reader for reader in ("jsonl", "parquet", "tar") if any(n.endswith(f".{reader}") for n in names)}
        if "jsonl" in found:  # tars beside it hold its pictures
            found.discard("tar")
        folder = os.path.expanduser(path)
        if not found and os.path.isdir(folder) and pictures(folder)[0]:
            found = {"folder"}
        return cls._only(name, path, found, "says no reader")

    def open(self, files: Sequence[str], name: str, log: FaultLog | None = None, cache: str | None = None
             ) -> Documents:
        """The records in some of its files. UserError: there is none."""
        reader = self._reader()(files, Everything(), name=name, log=log, cache=cache)
        reader.prompt = self.prompt
        return reader

    def rows(self, reader: Documents) -> np.ndarray:
        """Numbers of the records that are its own. UserError: none has its category."""
        if not self.category:
            return np.arange(len(reader))
        rows = np.flatnonzero(reader.of_category(self.category))
        if not len(rows):
            raise UserError(f"source {reader.name!r}: none of {len(reader)} records has the category "
                            f"{self.category!r}; correct data.sources.{reader.name}.category")
        return rows


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
