"""Sampled ids to text, so that what reads like a special token was one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np


def behind(ids: Sequence[int] | np.ndarray, close: int) -> Sequence[int] | np.ndarray:
    """What was said when thinking had ended: ids behind the first `close`, none without one."""
    at = np.flatnonzero(np.asarray(ids) == close)
    return ids[at[0] + 1 :] if len(at) else ids[:0]


def answer_text(tokenizer: Any, ids: Sequence[int] | np.ndarray, stops: Collection[int] = ()) -> str:
    """The text of an answer with special tokens by name, without the stop token that ends it.

    Plain pieces may spell "<|begin_of_box|>" letter by letter; the model did not say it then, and a grader must not
    be told it did: such a spelling comes out as "< |begin_of_box|>".
    """
    ids = [int(i) for i in ids]
    if ids and ids[-1] in stops:
        ids = ids[:-1]
    special = set(tokenizer.special.values())
    parts = []
    for is_special, run in itertools.groupby(ids, key=special.__contains__):
        text = tokenizer.decode(list(run), keep_special=True)
        parts.append(text if is_special else text.replace("<|", "< |"))
    return "".join(parts)
