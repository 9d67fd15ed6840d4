"""One random generator an item: what a source yields at index i depends on (seed, names, i) and on nothing else."""

from __future__ import annotations

import zlib

import numpy as np

# Long enough that no run meets the end, short enough for 32-bit index shuffles.
ENDLESS = 1 << 30


def generator(seed: int, *keys: str | int) -> np.random.Generator:
    """A generator of its own for every (seed, keys); strings are hashed with CRC-32, so the same on every machine."""
    words = [zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))
