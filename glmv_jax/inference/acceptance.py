"""What drafts are worth: tokens a pass, and what they cost, from measured rates and measured times.

Draft k = 1..K is kept with rate a_k of the passes in which all before it were; a pass then yields
1 + a_1 + a_1 a_2 + ... tokens, the accept length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from glmv_jax.inference.settings import Counts


def rates(counts: Counts) -> list[float]:
    """a_1..a_K of what an engine counted, nan for a draft that was never reached."""
    return [float(a / r) if r else math.nan for a, r in zip(counts.accepted, counts.reached)]


def accept_length(rates: Sequence[float]) -> float:
    """Tokens a pass of the backbone yields on average, 1 to K + 1. A draft never reached (nan) counts as rejected."""
    return 1.0 + float(np.cumprod(np.nan_to_num(np.asarray(rates, np.float64))).sum())


def speedup(rates: Sequence[float], verify: float, draft: float) -> float:
    """Tokens a second over those of plain decoding.

    verify: time of the backbone's pass over K + 1 tokens; draft: time a token of the head, its output layer included;
    both over the time of a plain step. A pass takes verify + K draft (the head reads what was said, which is its first
    draft, and then K - 1 drafts).
    """
    return accept_length(rates) / (verify + len(rates) * draft)


def break_even(drafts: int, verify: float, draft: float) -> float:
    """The rate, the same for every draft, at which `speedup` is 1: 0 if drafts cost nothing, inf if none suffices."""
    cost = verify + drafts * draft
    if cost <= 1:
        return 0.0
    if cost > drafts + 1:
        return math.inf
    low, high = 0.0, 1.0  # 1 + a + ... + a^K grows with a
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accept_length([middle] * drafts) < cost else (low, middle)
    return high
