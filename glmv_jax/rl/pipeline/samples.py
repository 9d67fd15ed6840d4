"""Every answer that was trained on, and everything that befell the others, one JSON line each.

Rows of kind "sample" are what `rl.metrics.summary` takes; beside its keys they hold the tokens and, token by token, the
version of the policy that drew it. The other kinds are those of `scheduler.Scheduler`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glmv_jax.rl.pipeline.group import Group


def sample_rows(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """A row for each answer of groups that the trainer takes. length: of what was drawn."""
    return [_row(group, i) for group in groups for i in range(len(group.members))]


def _row(group: Group, i: int) -> dict[str, Any]:
    member, prompt = group.members[i], group.prompt
    drawn, grade = member.answer.drawn.to_json(), member.grade
    length = sum(version >= 0 for version in drawn["versions"])
    return {
        "kind": "sample", "step": group.trained_at, "uid": prompt.uid, "key": prompt.key, "source": prompt.source,
        "member": i, "reward": grade.reward, "correct": grade.correct, "components": dict(grade.components),
        "flags": list(grade.flags), "length": length, "truncated": member.answer.reason != "stop",
        "trained_at": group.trained_at, **drawn, **member.answer.facts,
    }  # fmt: skip


class SampleLog:
    """A JSONL file that a restart cuts back to where it was when the state was saved, so that no row is there twice."""

    def __init__(self, path: Path, state: Mapping[str, int] | None = None) -> None:
        """state: of `get_state`, to go on from; None to begin anew. ValueError when the file is shorter than that."""
        path.touch()
        size, begin = path.stat().st_size, state["bytes"] if state else 0
        if size < begin:
            raise ValueError(f"{path} has {size} bytes where {begin} were written; it is not the file of this run")
        os.truncate(path, begin)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def get_state(self) -> dict[str, int]:
        """Everything written so far is in the file from now on."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell()}

    def close(self) -> None:
        self._file.close()
