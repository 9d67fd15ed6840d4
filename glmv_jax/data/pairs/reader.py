"""What all formats share: records of several files by number, and few files open at a time."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glmv_jax.data.cache import cached
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.pairs.fields import Fields, Record
from glmv_jax.data.records import Pair
from glmv_jax.typing import UserError

OPEN_FILES = 16


class Reader:
    """Random access to the pairs of one source: item i is a `records.Pair` whose image is its encoded bytes.

    A subclass says how many records a file has (`_count`) and reads one (`_read`). Files that cannot be counted are
    logged and have no record; a record that cannot be read raises when it is asked for.

    Args:
      files: paths, in the order of the records.     fields: which fields are picture and texts.
      name: of the source, for metrics and the log.  cache: folder for what is kept of files, as in `cache.cached`.
    Raises:
      UserError: no record in any of the files.
    """

    kind = ""  # of the cache's entries

    def __init__(self, files: Sequence[str], fields: Fields, *, name: str = "pairs",
                 log: FaultLog | None = None, cache: str | None = None) -> None:
        self.files, self.fields, self.name, self.cache = list(files), fields, name, cache
        self.log = log or FaultLog(None)
        self.counts = self._counts()
        self._ends = list(itertools.accumulate(self.counts))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"source {name!r}: no record in {len(self.files)} files, the first is {self.files[0]}")

    # ------------------------------------------------------------------------------------------------- a format
    def _counts(self) -> list[int]:
        counted = (self._cached(n, self.kind, partial(self._counted, n)) for n in range(len(self.files)))
        return [int(found["count"]) for found in counted]

    def _count(self, file: int) -> int:
        raise NotImplementedError

    def _read(self, file: int, row: int, picture: bool) -> Record:
        """The fields of a record; the picture may be left out where that is cheaper."""
        raise NotImplementedError

    def id(self, i: int) -> str:
        """Stable and unique in the source; nothing is read for it."""
        file, row = self.locate(i)
        return f"{Path(self.files[file]).name}/{row}"

    def blocks(self) -> np.ndarray:
        """Numbers of the first records of what is read at once; none where records are read one by one."""
        return np.zeros(1, np.int64)

    # --------------------------------------------------------------------------------------------- for all of them
    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Pair:
        record = self._read(*self.locate(i), True)
        return Pair(id=self.id(i), image=self.fields.picture(record), texts=self.fields.texts(record), source=self.name)

    def texts(self, i: int) -> dict[str, list[str]]:
        """The texts by language alone."""
        return self.fields.texts(self._read(*self.locate(i), False))

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the file, row in it) of record i."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in source {self.name!r}")
        file = bisect.bisect_right(self._ends, i)
        return file, i - (self._ends[file] - self.counts[file])

    def start(self, file: int) -> int:
        """Number of the first record of a file."""
        return self._ends[file] - self.counts[file]

    def per_file(self, what: str, of_file: Callable[[int], np.ndarray]) -> np.ndarray:
        """An array over all records, made file by file and kept in the cache."""
        what = f"{self.kind} {what} {dataclasses.asdict(self.fields)}"
        build = lambda file: ({"x": of_file(file)}, True)  # noqa: E731
        return np.concatenate([self._cached(n, what, partial(build, n))["x"] for n in range(len(self.files))])

    def _cached(self, file: int, kind: str, build: Callable[[], Any]) -> dict[str, np.ndarray]:
        return cached(self.files[file], kind, build, self.cache)

    def _counted(self, file: int) -> tuple[dict[str, np.ndarray], bool]:
        try:
            return {"count": np.array(self._count(file))}, True
        except (UserError, OSError) as error:
            self.log.add(self.name, self.files[file], f"{error}; the file is left out")
            return {"count": np.array(0)}, False


class Opened:
    """The files used last, open; older ones are closed. In another process none is.

    open_: path -> what reads it.   close: what to do with that when it is no longer used.
    """

    def __init__(self, open_: Callable[[str], Any], close: Callable[[Any], None], most: int = OPEN_FILES) -> None:
        self._open, self._close, self._most = open_, close, most
        self._files: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def __getitem__(self, key: Any) -> Any:
        if key in self._files:
            self._files.move_to_end(key)
        else:
            self._files[key] = self._open(key)
            if len(self._files) > self._most:
                self._close(self._files.popitem(last=False)[1])
        return self._files[key]

    def __reduce__(self) -> tuple:
        return Opened, (self._open, self._close, self._most)
