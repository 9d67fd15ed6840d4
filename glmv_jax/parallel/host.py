"""The host process: what makes XLA's CPU backend faster without changing a number."""

from __future__ import annotations

import ctypes
import sys

# Names and numbers of <malloc.h> in glibc.
_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_TOP_PAD = -8, -4, -1, -2


def keep_freed_memory() -> bool:
    """Makes glibc keep what a step frees for the next one, instead of giving it back and faulting it in again.

    XLA on a CPU allocates its buffers anew in every step; at 100 MB and more each is a fresh mapping, and a third of
    the time of a nano step was page faults (0.45 s -> 0.29 s a step, 198,000 -> 20,000 faults, two cores). Call it
    before JAX makes its threads, which get arenas of their own otherwise. Returns False where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # One arena, no mappings of their own for large blocks (a threshold cannot exceed 2 GiB), nothing given back.
    options = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 28))
    return all([mallopt(option, value) for option, value in options])
