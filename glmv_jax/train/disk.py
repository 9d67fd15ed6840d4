"""What disks do: files written whole, damage noticed, and failures told as one line with a remedy."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmv_jax.typing import UserError

SUMS = "checksums.json"

_REMEDIES = {
    errno.ENOSPC: "the disk is full: make room or choose another workdir",
    errno.EDQUOT: "the disk quota is used up: make room or choose another workdir",
    errno.EFBIG: "the file is larger than this system allows: choose another workdir",
    errno.EROFS: "the disk is read-only: choose another workdir",
    errno.EACCES: "no permission to write there: choose another workdir",
    errno.EPERM: "no permission to write there: choose another workdir",
    errno.EEXIST: "a file is in the way: move it or choose another workdir",
    errno.ENOTDIR: "a file is in the way: move it or choose another workdir",
    errno.EISDIR: "a folder is in the way: move it or choose another workdir",
    errno.ENOENT: "the folder cannot be made there: choose another workdir",
}
# tensorstore reports the same conditions as ValueError with the system's words in it.
_WORDS = {os.strerror(code): code for code in _REMEDIES}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a disk can do to a write into a UserError with the path and the remedy; lets all else through."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            code = _code(cause)
            if code in _REMEDIES:
                raise UserError(f"cannot write {path}: {_REMEDIES[code]}") from error
            cause = cause.__cause__ or cause.__context__
        raise


def _code(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return next((code for words, code in _WORDS.items() if words in str(error)), None)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is the old one or the new one, never half; UserError for a bad disk."""
    with disk_errors(path):
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)


def seal(folder: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Writes the size and CRC-32 of every file of the folder into its checksums.json."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((SUMS, *leave_out)))
    write_json(folder / SUMS, {str(p.relative_to(folder)): (p.stat().st_size, _crc(p)) for p in files})


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a sealed folder, in words; None when nothing is, or when it was never sealed."""
    if not (folder / SUMS).exists():
        return None
    try:
        for name, (size, crc) in json.loads((folder / SUMS).read_text(encoding="utf-8")).items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _crc(path) != crc:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{SUMS}: {error}"
    return None


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def size_text(n: int) -> str:
    """Bytes for people."""
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{n / 2**20:.1f} MB"
