"""WebDataset: tar files in which the files of one stem are one record (00017.jpg, 00017.txt, 00017.json, 00017.zh.txt).

The fields of a record are its files by extension, and what a .json holds by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmv_jax.data.faults import FaultLog
from glmv_jax.data.files import EXTENSIONS
from glmv_jax.data.pairs.fields import Record, from_json
from glmv_jax.data.pairs.reader import Reader
from glmv_jax.data.tars import Tars


class WebDataset(Reader):
    """Pairs of tar files; their headers are read once (`tars.Tars`)."""

    kind = "tar"

    def __init__(
        self, files: Sequence[str], *args: Any, log: FaultLog | None = None, cache: str | None = None, **options: Any
    ) -> None:
        self._tars = Tars(files, log, cache)
        super().__init__(self._tars.files, *args, log=log, cache=cache, **options)

    def _counts(self) -> list[int]:
        return self._tars.counts

    def _read(self, file: int, row: int, picture: bool) -> Record:
        return sample(self._tars.read(self.start(file) + row, without=() if picture else EXTENSIONS))

    def id(self, i: int) -> str:
        return self._tars.id(i)


def sample(files: dict[str, bytes]) -> Record:
    """The files of a sample, and the fields of its .json where no file has that name."""
    return (from_json(files["json"]) if "json" in files else {}) | {k: v for k, v in files.items() if k != "json"}
