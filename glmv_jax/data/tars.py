"""Samples in tar files, as WebDataset writes them: files of one name up to the first dot make one sample.

    00000.tar:  cats/0001.jpg  cats/0001.txt  cats/0001.json     sample "cats/0001" with jpg, txt and json

A tar is usually read from end to end. Here its headers are read once, and samples are then at hand by number: reading
is shuffled, split among hosts and resumed like that of any other source. What the headers said is kept in a cache, and
in memory in arrays: about 60 bytes a sample of three files.
"""

from __future__ import annotations

import bisect
import functools
import glob
import itertools
import os
import re
import tarfile
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from glmv_jax.data.cache import Arrays, cached
from glmv_jax.data.faults import FaultLog
from glmv_jax.typing import UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Paths = str | Path | Sequence[str | Path]


class Tars:
    """Random access to the samples of tar files.

    Item i is (id, {extension: bytes}); the id is "<file>/<key>". Extensions are in lower case, and all that follows the
    first dot ("seg.png").

    Args:
      paths: a file, a folder (its *.tar), a pattern ("train-*.tar", "train-{000..127}.tar"), or several of these.
      log: where a tar that is cut short or broken is reported; the samples before the break are used.
      cache: folder for what the headers say, `cache.FOLDER` if not given; "" for none.
    Raises:
      UserError: nothing matches, a compressed tar, or no sample in any of them.
    """

    def __init__(self, paths: Paths, log: FaultLog | None = None, cache: str | Path | None = None) -> None:
        self.files = expand(paths)
        log = log or FaultLog(None)
        self._tables = [cached(path, "tar", functools.partial(_scan, path, log), cache) for path in self.files]
        self.counts = [len(table["key_ends"]) for table in self._tables]
        self._ends = list(itertools.accumulate(self.counts))
        if not self._ends[-1]:
            raise UserError(f"{paths}: no sample in {len(self.files)} tar files")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> tuple[str, dict[str, bytes]]:
        return self.id(i), self.read(i)

    def id(self, i: int) -> str:
        """The id of sample i; nothing is read."""
        file, row = self._locate(i)
        table = self._tables[file]
        start, end = _span(table["key_ends"], row)
        return f"{Path(self.files[file]).name}/{table['keys'][start:end].tobytes().decode()}"

    def extensions(self, i: int) -> list[str]:
        """Those of the files of sample i, in their order; nothing is read."""
        return [extension for extension, _ in self._members(i)]

    def read(self, i: int, wanted: Container[str] | None = None, without: Container[str] = ()) -> dict[str, bytes]:
        """The files of sample i by extension: all, or those `wanted`, but not those `without`."""
        file, _ = self._locate(i)
        table = self._tables[file]
        found = {}
        with open(self.files[file], "rb", buffering=0) as tar:  # not kept open: there may be thousands
            for extension, at in self._members(i):
                if (wanted is None or extension in wanted) and extension not in without:
                    found[extension] = os.pread(tar.fileno(), int(table["size"][at]), int(table["offset"][at]))
        return found

    def _members(self, i: int) -> list[tuple[str, int]]:
        """(extension, place in the file's table) of the files of sample i."""
        file, row = self._locate(i)
        table = self._tables[file]
        places = range(*_span(table["file_ends"], row))
        return [(str(table["extensions"][table["extension"][at]]), at) for at in places]

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        file = bisect.bisect_right(self._ends, i)
        return file, i - (self._ends[file] - self.counts[file])


def expand(paths: Paths, pattern: str = "*.tar") -> list[str]:
    """The files that a path, a folder (what matches `pattern` there), a pattern or several of these stand for, in
    order."""
    if not isinstance(paths, (str, Path)):
        return [file for path in paths for file in expand(path, pattern)]
    text = os.path.expanduser(str(paths))
    if match := _RANGE.search(text):
        first, last = match.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [file for n in numbers for file in expand(text[: match.start()] + n + text[match.end() :], pattern)]
    if os.path.isdir(text):
        text = os.path.join(glob.escape(text), pattern)
    files = [text] if os.path.exists(text) else sorted(glob.glob(text))
    if not files:
        kind = pattern.strip("*.")
        raise UserError(
            f"{paths}: no {kind} file here; give a .{kind}, a folder of them, or a pattern such as 'a-*.{kind}'"
        )
    return files


def _span(ends: np.ndarray, row: int) -> tuple[int, int]:
    return int(ends[row - 1]) if row else 0, int(ends[row])


def _table(samples: dict[str, dict[str, tuple[int, int]]]) -> Arrays:
    """Samples as arrays, end to end: what each key's bytes and each sample's files end at tells them apart."""
    keys = [key.encode() for key in samples]
    files = [(ext, *at) for sample in samples.values() for ext, at in sample.items()]
    extensions = sorted({ext for ext, _, _ in files})
    large = any(size >= 2**32 for _, _, size in files)
    number = {ext: n for n, ext in enumerate(extensions)}
    return {
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.uint32),
        "file_ends": np.cumsum([len(sample) for sample in samples.values()], dtype=np.uint32),
        "extensions": np.array(extensions, np.str_),
        "extension": np.array([number[ext] for ext, _, _ in files], np.uint16),
        "offset": np.array([offset for _, offset, _ in files], np.int64),
        "size": np.array([size for _, _, size in files], np.int64 if large else np.uint32),
    }


def _scan(path: str, log: FaultLog) -> tuple[Arrays, bool]:
    """Samples by their headers, and whether the file was whole."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")):  # gzip, bzip2, xz, zstd
        raise UserError(f"{path} is compressed, and samples are read from its middle; decompress it first")
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    size, whole = os.path.getsize(path), True
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not stem:  # ".DS_Store", "._0001.jpg"
                    continue
                files = samples.setdefault(f"{folder}/{stem}".removeprefix("./").lstrip("/"), {})
                files[extension.lower()] = (member.offset_data, member.size)
            if size < tar.offset + tarfile.BLOCKSIZE:  # a whole one ends in empty blocks
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, EOFError) as error:
        whole = False
        log.add("tars", path, f"{error}; the {len(samples)} samples before that are used")
    return _table(samples), whole
