"""What goodput.jsonl says: where the wall time of a run went, over all its attempts. `train.goodput` writes it.

A row is {"attempt": 1, "step": 40, "seconds": {"steps": 12.3, "evaluation": 1.0}}: the seconds since the row before it,
spent on the way to that step; the last one of an attempt that a signal ended has {"signal": 15} too.
"""

from __future__ import annotations

import collections
from typing import Any

PARTS = {
    "steps": "training steps, and what the host does between them",
    "rollouts": "answers being written and graded, of reinforcement learning",
    "data wait": "devices without a batch",
    "start-up": "set-up, parameters, restoring",
    "compile": "programs being compiled",
    "checkpoint": "the loop waiting for a copy or a disk",
    "evaluation": "on held-out data, samples among them",
    "lost": "steps, evaluations and checkpoints that a restart has undone",
}
USEFUL = ("steps", "rollouts")


def is_row(row: dict[str, Any]) -> bool:
    """Whether a line is one of them."""
    whole = all(isinstance(row.get(name), int) for name in ("attempt", "step"))
    return whole and _are_seconds(row.get("seconds"))


def is_summary(found: dict[str, Any]) -> bool:
    """Whether it has the form of `summary`, or is empty."""
    share = found.get("goodput")
    return not found or _are_seconds(found.get("seconds")) and (share is None or isinstance(share, (int, float)))


def _are_seconds(seconds: Any) -> bool:
    return isinstance(seconds, dict) and all(isinstance(x, (int, float)) for x in seconds.values())


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{"goodput": share of the time in USEFUL parts, "seconds": {part: seconds}, "attempts": how many}.

    The first row of an attempt says from which step it goes on. What earlier attempts did behind that step is lost:
    all but their start-up and their compiling, which have a name already.
    """
    kept: list[tuple[int, dict[str, float]]] = []
    attempt = 0
    for row in rows:
        if row["attempt"] != attempt:
            attempt = row["attempt"]
            kept = [(step, _lost(seconds) if step > row["step"] else seconds) for step, seconds in kept]
        kept.append((row["step"], row["seconds"]))
    total: collections.Counter[str] = collections.Counter()
    for _, seconds in kept:
        total.update(seconds)
    spent = sum(total.values())
    useful = sum(total[part] for part in USEFUL)
    parts = {part: round(total[part], 3) for part in PARTS if total[part]}
    return {"goodput": useful / spent if spent else None, "seconds": parts, "attempts": attempt}


def _lost(seconds: dict[str, float]) -> dict[str, float]:
    own = {part: spent for part, spent in seconds.items() if part in ("start-up", "compile", "lost")}
    gone = sum(seconds.values()) - sum(own.values())
    return own | {"lost": own.get("lost", 0.0) + gone}
