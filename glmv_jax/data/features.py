"""Teachers' features of stage 1 on disk: written once, then read by position beside the crops they are of.

    DIR/cache.json                      facts (all that the features depend on), items, rows and the teachers
    DIR/train-0000/000000.safetensors   the first `rows` crops that host 0 of the training reads, then the next ones
    DIR/heldout-0000/...                the same of its held-out crops

A file holds for each teacher [rows, P, C] bfloat16 in the student's patch order, `key` [rows, 64] uint8 and `ids`, a
JSON list as bytes. It gets its name when all of it is on disk, so a file that is there is whole. A key is 16 bytes that
say which crop of which picture it is (a hash of id, source, box and the picture's size) and a thumbnail of 4 x 4
colours, which tells a picture that was replaced under its name; decoders may differ by a few levels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import grain
import ml_dtypes
import numpy as np

from glmv_jax.data.stream import Rows
from glmv_jax.typing import UserError

FORMAT = 1
KEY = 64
_CELLS, _LEVELS = 4, 6  # of the thumbnail: cells a side, and how far a colour may be from the stored one
FILE_BYTES = 2**28
_DTYPES = {"BF16": np.dtype(np.uint16), "U8": np.dtype(np.uint8)}  # as they are read; bfloat16 has no buffer of its own


def key(id_: str, source: int, box: Sequence[int], size: Sequence[int], pixels_SS3: np.ndarray) -> np.ndarray:
    """[64] uint8: which crop this is, and how it looks."""
    what = hashlib.blake2b(json.dumps([id_, source, *box, *size]).encode(), digest_size=16).digest()
    n = pixels_SS3.shape[0] // _CELLS
    lines = pixels_SS3[: n * _CELLS, : n * _CELLS].reshape(_CELLS, n, -1)
    sums = lines.sum(1, dtype=np.uint32).reshape(_CELLS, _CELLS, n, 3).sum(2)  # in two: many times faster than at once
    return np.concatenate([np.frombuffer(what, np.uint8), (sums // n**2).astype(np.uint8).ravel()])


def rows_per_file(bytes_per_crop: int) -> int:
    """A power of two from 16 to 256, and a quarter of a gigabyte at most if it can: so much a kill may cost."""
    return 2 ** min(8, max(4, int(math.log2(FILE_BYTES / bytes_per_crop))))


def folder(split: str, host: int) -> str:
    """The name of the folder of what one host reads."""
    return f"{split}-{host:04d}"


def file_name(number: int) -> str:
    return f"{number:06d}.safetensors"


# ------------------------------------------------------------------------------------------------------------- writing


def write_file(path: Path, features: Mapping[str, np.ndarray], keys_N64: np.ndarray, ids: Iterable[str]) -> None:
    """One file, whole or not at all. features: teacher -> [N, P, C] bfloat16."""
    arrays = {name: np.ascontiguousarray(x, ml_dtypes.bfloat16).view(np.uint16) for name, x in features.items()}
    arrays["key"] = np.ascontiguousarray(keys_N64)
    arrays["ids"] = np.frombuffer(json.dumps(list(ids)).encode(), np.uint8)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, at = {}, 0
    for name, x in arrays.items():
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": (at, at + x.nbytes)}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for x in arrays.values():
                file.write(x.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- reading


class FeatureCache:
    """A folder that `glmv cache-teachers` wrote.

    Attributes: facts: name -> what the features depend on. items: split -> crops of each host. rows: crops of a file.
      teachers: name -> {"channels", "patches", "about"}.
    Raises: UserError when there is no cache, or one of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        file = self.path / "cache.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            self.facts: dict[str, Any] = record["facts"]
            self.items: dict[str, int] = record["items"]
            self.rows: int = record["rows"]
            self.teachers: dict[str, dict[str, Any]] = record["teachers"]
        except FileNotFoundError:
            raise UserError(f"{path}: no cache.json here; write the cache with glmv cache-teachers") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({type(error).__name__}); write the cache anew") from None
        self._open: dict[str, tuple[BinaryIO, dict[str, Any], int]] = {}

    def check(self, facts: Mapping[str, Any]) -> None:
        """UserError naming the first of `facts` that is another one here."""
        for name, mine in facts.items():
            theirs = self.facts.get(name)
            if theirs != json.loads(json.dumps(mine)):
                raise UserError(f"the teacher cache {self.path} is of another run: {name} is {_short(theirs)} there "
                                f"and {_short(mine)} here; write one for this run with glmv cache-teachers")

    def check_whole(self, split: str, host: int) -> None:
        """UserError when a file of this host is missing."""
        where = self.path / folder(split, host)
        there = set(os.listdir(where)) if where.is_dir() else set()
        wanted = [file_name(n) for n in range(self.items[split] // self.rows)]
        missing = [name for name in wanted if name not in there]
        if missing:
            raise UserError(f"the teacher cache {self.path} is not finished: {len(missing)} of {len(wanted)} files of "
                            f"{where.name} are missing; run its glmv cache-teachers again, it goes on where it stopped")

    def read(self, split: str, host: int, at_B: np.ndarray, names: Iterable[str]) -> tuple[Rows, np.ndarray]:
        """Features [B, P, C] bfloat16 by name, and keys [B, 64], of the crops at these positions of a host.

        Neighbouring positions are read in one piece, straight into the batch.
        """
        result: Rows = {}
        for name in (*names, "key"):
            out: Any = None
            for first, last, row in _runs(at_B, self.rows):
                file, header, base = self._file(split, host, int(at_B[first]) // self.rows)
                entry: Any = header[name]
                shape = entry["shape"][1:]
                if out is None:
                    out = np.empty((len(at_B), *shape), _DTYPES[entry["dtype"]])
                stride = out[0].nbytes
                file.seek(base + entry["data_offsets"][0] + row * stride)
                _fill(file, out[first:last])
            result[name] = out
        keys = result.pop("key")
        return {name: x.view(ml_dtypes.bfloat16) for name, x in result.items()}, keys

    def id_at(self, split: str, host: int, position: int) -> str:
        """The id of the picture there."""
        file, header, base = self._file(split, host, position // self.rows)
        first, last = header["ids"]["data_offsets"]
        file.seek(base + first)
        return json.loads(file.read(last - first))[position % self.rows]

    def _file(self, split: str, host: int, number: int) -> tuple[BinaryIO, dict[str, Any], int]:
        """(the open file, its header, where its data begin); the few last used stay open."""
        name = f"{folder(split, host)}/{file_name(number)}"
        if name not in self._open:
            while len(self._open) >= 4:
                self._open.pop(next(iter(self._open)))[0].close()
            self._open[name] = _opened(self.path / name)
        return self._open[name]


def _runs(at_B: np.ndarray, rows: int) -> list[tuple[int, int, int]]:
    """Stretches of neighbouring positions that lie in one file: (first, last + 1 in the batch, row of the first)."""
    new = np.flatnonzero((np.diff(at_B) != 1) | (at_B[1:] % rows == 0)) + 1
    edges = [0, *new.tolist(), len(at_B)]
    return [(a, b, int(at_B[a]) % rows) for a, b in zip(edges, edges[1:])]


def _fill(file: BinaryIO, out: np.ndarray) -> None:
    view, done = out.data.cast("B"), 0
    while done < len(view):
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise UserError(f"{file.name} ends too early; delete it and run its glmv cache-teachers again")
        done += got


def _opened(path: Path) -> tuple[BinaryIO, dict[str, Any], int]:
    try:
        with contextlib.ExitStack() as on_error:
            file = on_error.enter_context(open(path, "rb", buffering=0))
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            end = max(entry["data_offsets"][1] for entry in header.values())
            if os.fstat(file.fileno()).st_size != 8 + length + end:
                raise ValueError("wrong size")
            on_error.pop_all()
            return file, header, 8 + length
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run its glmv cache-teachers again") from None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


class WithFeatures(grain.IterDataset):
    """Batches of crops with what is stored of them; the crops themselves are left out.

    parent: batches with position [B], key [B, 64], id [B] and image. Here and not in worker processes: a batch's
    features are one or two long reads, and would have to be copied twice more to come out of a worker.
    """

    def __init__(self, parent: grain.IterDataset, cache: FeatureCache, names: Sequence[str], split: str, host: int):
        super().__init__(parent)
        self.cache, self.names, self.split, self.host = cache, tuple(names), split, host

    def __iter__(self) -> grain.DatasetIterator:
        return _WithFeaturesIterator(self._parent.__iter__(), self)


class _WithFeaturesIterator(grain.DatasetIterator):

    def __init__(self, parent: grain.DatasetIterator, dataset: WithFeatures):
        super().__init__(parent)
        self._dataset = dataset

    def __next__(self) -> dict[str, Any]:
        d, batch = self._dataset, dict(next(self._parent))
        at_B, keys, ids = (batch.pop(name) for name in ("position", "key", "id"))
        del batch["image"]
        features, stored = d.cache.read(d.split, d.host, at_B, d.names)
        other = (keys[:, :16] != stored[:, :16]).any(1)
        looks = (np.abs(keys[:, 16:].astype(np.int16) - stored[:, 16:]) > _LEVELS).any(1)
        if (other | looks).any():
            row = int(np.flatnonzero(other | looks)[0])
            self._refuse(int(at_B[row]), ids[row].decode(errors="surrogateescape"), bool(other[row]))
        return batch | {"features": features}

    def _refuse(self, position: int, id_: str, other: bool) -> None:
        d = self._dataset
        there = d.cache.id_at(d.split, d.host, position)
        what = (f"another crop of {id_} there" if there == id_ else f"{there} there and {id_} here") if other else (
            f"{id_}, and that picture has changed since")
        raise UserError(f"the teacher cache {d.cache.path} is stale: crop {position} of {folder(d.split, d.host)} is "
                        f"{what}; write it anew with glmv cache-teachers")

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)

    def close(self) -> None:
        self._parent.close()
