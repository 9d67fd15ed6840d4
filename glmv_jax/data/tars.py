"""Samples in tar files, as WebDataset writes them: files of one name up to the first dot make one sample.

    00000.tar:  cats/0001.jpg  cats/0001.txt  cats/0001.json     sample "cats/0001" with jpg, txt and json

A tar is usually read from end to end. Here its headers are read once, and samples are then at hand by number: reading
is shuffled, split among hosts and resumed like that of any other source. What the headers said is kept in a cache.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from glmv_jax.data.faults import FaultLog
from glmv_jax.typing import UserError

CACHE = "~/.cache/glmv_jax/tars"
_FORMAT = 1  # of what is in the cache
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Paths = str | Path | Sequence[str | Path]
# A sample: its key, and of each of its files the offset and the size by extension.
_Sample = tuple[str, dict[str, tuple[int, int]]]


class Tars:
    """Random access to the samples of tar files.

    Item i is (id, {extension: bytes}); the id is "<file>/<key>". Extensions are in lower case, and all that follows the
    first dot ("seg.png").

    Args:
      paths: a file, a folder (its *.tar), a pattern ("train-*.tar", "train-{000..127}.tar"), or several of these.
      log: where a tar that is cut short or broken is reported; the samples before the break are used.
      cache: folder for what the headers say, CACHE if not given; "" for none.
    Raises:
      UserError: nothing matches, a compressed tar, or no sample in any of them.
    """

    def __init__(self, paths: Paths, log: FaultLog | None = None, cache: str | Path | None = None) -> None:
        self.files = expand(paths)
        kept = str(CACHE if cache is None else cache)
        tables = [_cached(path, log or FaultLog(None), kept) for path in self.files]
        self._samples = list(itertools.chain.from_iterable(tables))
        self._ends = list(itertools.accumulate(map(len, tables)))
        if not self._samples:
            raise UserError(f"{paths}: no sample in {len(self.files)} tar files")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> tuple[str, dict[str, bytes]]:
        file = self._file_of(i)
        _, members = self._samples[i]
        with open(self.files[file], "rb", buffering=0) as tar:  # not kept open: there may be thousands
            read = {ext: os.pread(tar.fileno(), size, offset) for ext, (offset, size) in members.items()}
        return self.id_of(i), read

    def id_of(self, i: int) -> str:
        """The id of item i, which is not read."""
        return f"{Path(self.files[self._file_of(i)]).name}/{self._samples[i][0]}"

    def _file_of(self, i: int) -> int:
        return bisect.bisect_right(self._ends, i)


def expand(paths: Paths) -> list[str]:
    """The tar files that a path, a folder, a pattern or several of these stand for, in order."""
    if not isinstance(paths, (str, Path)):
        return [file for path in paths for file in expand(path)]
    text = os.path.expanduser(str(paths))
    if match := _RANGE.search(text):
        first, last = match.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [file for n in numbers for file in expand(text[: match.start()] + n + text[match.end() :])]
    if os.path.isdir(text):
        text = os.path.join(glob.escape(text), "*.tar")
    files = [text] if os.path.exists(text) else sorted(glob.glob(text))
    if not files:
        raise UserError(f"{paths}: no tar file here; give a .tar, a folder of them, or a pattern such as 'a-*.tar'")
    return files


def _cached(path: str, log: FaultLog, cache: str) -> list[_Sample]:
    stat = os.stat(path)
    mark = json.dumps([_FORMAT, os.path.abspath(path), stat.st_size, stat.st_mtime_ns])
    kept = Path(cache).expanduser() / f"{hashlib.sha256(mark.encode()).hexdigest()[:32]}.json"
    if cache and kept.exists():
        try:
            return [(key, {ext: tuple(at) for ext, at in files.items()}) for key, files in json.loads(kept.read_text())]
        except (OSError, ValueError):
            pass  # cannot be read, or is no JSON: the headers say it again
    samples, whole = _scan(path, log)
    if cache and whole:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(samples))
            temporary.replace(kept)
        except OSError:
            pass  # a cache that cannot be written costs time, nothing else
    return samples


def _scan(path: str, log: FaultLog) -> tuple[list[_Sample], bool]:
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
    return list(samples.items()), whole
