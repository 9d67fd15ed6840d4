"""Parquet files, as Hugging Face's data sets are stored: a column of pictures, struct<bytes, path> or binary, and
columns of texts (strings, or lists of them).

A record is found by its row group, the least that a parquet file gives. Those used last are kept, and `balance.Order`
asks for the records of few row groups at a time. Small ones (100 records) are the best: each worker process reads each.
"""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from glmv_jax.data.cache import cached
from glmv_jax.data.pairs.fields import Record
from glmv_jax.data.pairs.reader import Opened, Reader
from glmv_jax.typing import UserError

KEPT = 1 << 30  # bytes of row groups in memory, in each process


class Parquet(Reader):
    """Pairs of parquet files."""

    kind = "parquet"

    def _counts(self) -> list[int]:
        self._open = Opened(_file, _closed)
        self._kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._group_ends = []  # of each file, of its row groups
        for n, path in enumerate(self.files):
            rows = cached(path, "parquet", functools.partial(self._grouped, n), self.cache)["rows"]
            self._group_ends.append(list(itertools.accumulate(map(int, rows))))
        return [ends[-1] if ends else 0 for ends in self._group_ends]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": collections.OrderedDict()}

    def _grouped(self, file: int) -> tuple[dict[str, np.ndarray], bool]:
        try:
            meta = self._open[self.files[file]].metadata
            return {"rows": np.array([meta.row_group(g).num_rows for g in range(meta.num_row_groups)], np.int64)}, True
        except UserError as error:
            self.log.add(self.name, self.files[file], f"{error}; the file is left out")
            return {"rows": np.zeros(0, np.int64)}, False

    def blocks(self) -> np.ndarray:
        """Numbers of the first records of all row groups."""
        starts = [self.start(n) + np.array([0, *ends[:-1]]) for n, ends in enumerate(self._group_ends) if ends]
        return np.concatenate(starts)

    def _read(self, file: int, row: int, picture: bool) -> Record:
        ends = self._group_ends[file]
        group = bisect.bisect_right(ends, row)
        table = self._group(file, group, picture)
        at = row - (ends[group - 1] if group else 0)
        record = {name: table.column(name)[at].as_py() for name in table.column_names}
        image = next((v for k, v in record.items() if isinstance(v, dict) and "path" in v and not v.get("bytes")), None)
        if picture and image and image["path"]:  # the picture lies beside the parquet file
            with open(os.path.join(os.path.dirname(self.files[file]), image["path"]), "rb") as beside:
                image["bytes"] = beside.read()
        return record

    def _group(self, file: int, group: int, picture: bool) -> Any:
        key = file, group, picture
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        opened = self._open[self.files[file]]
        columns = [name for name in opened.schema_arrow.names if self.fields.uses(name, picture)]
        table = _guarded(lambda: opened.read_row_group(group, columns=columns), f"row group {group}")
        self._kept[key] = table
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return table


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading parquet files needs pyarrow; pip install 'glmv_jax[data]'") from None
    return pyarrow


def _guarded(read: Callable[[], Any], what: str) -> Any:
    """What `read` gives; whatever pyarrow finds wrong with a file is a UserError."""
    pyarrow = _pyarrow()
    try:
        return read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what} cannot be read ({reason})") from None


def _file(path: str) -> Any:
    pyarrow = _pyarrow()
    return _guarded(lambda: pyarrow.parquet.ParquetFile(path), "the parquet file")


def _closed(file: Any) -> None:
    file.close()

