"""What was learnt of a data file by reading all of it, kept so that the next run need not: headers, counts, languages.

One .npz of arrays a file and kind, under a name made of the file's path, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "~/.cache/glmv_jax/data"
_FORMAT = 1  # of what is in the cache

Arrays = dict[str, np.ndarray]


def cached(path: str, kind: str, build: Callable[[], tuple[Arrays, bool]], folder: str | Path | None = None) -> Arrays:
    """The arrays that `build` makes of the file, from the cache if they are there.

    kind: what they are, and all they depend on beside the file. build() -> (arrays, whether to keep them: not those
    of a file that is still being written or is broken). folder: FOLDER if not given; "" for no cache.
    """
    folder = str(FOLDER if folder is None else folder)
    if not folder:
        return build()[0]
    stat = os.stat(path)
    mark = json.dumps([_FORMAT, kind, os.path.abspath(path), stat.st_size, stat.st_mtime_ns])
    kept = Path(folder).expanduser() / f"{hashlib.sha256(mark.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(kept, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        pass  # not there, or cannot be read: the file says it again
    arrays, whole = build()
    if whole:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(f".{os.uname().nodename}-{os.getpid()}")  # hosts may share the folder
            named: dict[str, Any] = arrays
            with temporary.open("wb") as file:
                np.savez(file, **named)
            temporary.replace(kept)
        except OSError:
            pass  # a cache that cannot be written costs time, nothing else
    return arrays
