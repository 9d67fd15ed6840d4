"""Every answer that was graded for a step, what was asked, and everything that befell other answers, a JSON line each.

Rows of kind "sample" are what `rl.metrics.summary` takes; beside its keys they hold the tokens and, token by token, the
version of the policy that drew it (-1: an environment's). A row of kind "prompt" says once for a group what was asked.
The other kinds are those of `scheduler.Scheduler`. Images are files of their own, once each, named by the hash that
rows have (`data.hashes.image_hash`): the very pixels that the policy saw.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from glmv_jax.data.naflex import apart, unpatchify
from glmv_jax.rl.pipeline.group import Group

if TYPE_CHECKING:
    from glmv_jax.data.records import Sample
    from glmv_jax.rl.rollout import Rollout


def prompt_rows(rows: Iterable[Mapping[str, Any]], samples: Iterable[Sample | None]) -> list[dict[str, Any]]:
    """What was asked, once for each group of these rows of answers; nothing where there is no sample. places: whether
    answers name boxes or points of the image."""
    return [
        {"kind": "prompt", "step": row["step"], "uid": row["uid"], "id": sample.id, "source": row["source"],
         "prompt": sample.prompt, "gold": sample.answer, "places": bool(sample.meta.get("boxes"))}
        for row, sample in zip(rows, samples, strict=True) if row["member"] == 0 and sample is not None
    ]  # fmt: skip


def sample_rows(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """A row for each answer of groups that the trainer takes. length: of what was drawn."""
    return [_row(group, i) for group in groups for i in range(len(group.members))]


def _row(group: Group, i: int) -> dict[str, Any]:
    member, prompt = group.members[i], group.prompt
    drawn, facts = member.answer.drawn.to_json(), dict(member.answer.facts)
    images = _split(facts.pop("images", ""))
    if (episode := member.answer.episode) is not None:
        images = list(episode.transcript.hashes)
    return {
        "kind": "sample", "step": group.trained_at, "uid": prompt.uid, "key": prompt.key, "source": prompt.source,
        "member": i, **_graded(member.grade), "length": sum(version >= 0 for version in drawn["versions"]),
        "truncated": member.answer.reason != "stop", "trained_at": group.trained_at, **drawn, "images": images, **facts,
    }  # fmt: skip


def record_rows(records: Iterable[Rollout], step: int) -> list[dict[str, Any]]:
    """The same of records that one policy has drawn, after `step` updates, and that train it at once."""
    rows = []
    members: collections.Counter[str] = collections.Counter()
    for r in records:
        uid = f"{step}/{'question' if r.drawn is None else 'episode'} {r.row}"
        rows.append({
            "kind": "sample", "step": step, "uid": uid, "source": r.source, "member": members[uid],
            **_graded(r.grade), "length": len(r.said), "truncated": bool(r.truncated), "trained_at": step,
            "tokens": r.answer.tolist(), "logprobs": r.logprobs.tolist(),
            "versions": np.where(r.own, step, -1).tolist(), "images": _split(r.image_hash), "id": r.id, "text": r.text,
        })  # fmt: skip
        members[uid] += 1
    return rows


def _graded(grade: Any) -> dict[str, Any]:
    return {
        "reward": float(grade.reward), "correct": bool(grade.correct), "components": dict(grade.components),
        "flags": list(grade.flags),
    }  # fmt: skip


def _split(hashes: str) -> list[str]:
    return hashes.split(",") if hashes else []


class SampleLog:
    """A JSONL file that a restart cuts back to where it was when the state was saved, so that no row is there twice.

    A thread of its own writes it; what goes wrong there is said by the call after.
    """

    def __init__(self, path: Path, state: Mapping[str, int] | None = None) -> None:
        """state: of `get_state`, to go on from; None to begin anew. ValueError when the file is shorter than that."""
        path.touch()
        size, begin = path.stat().st_size, state["bytes"] if state else 0
        if size < begin:
            raise ValueError(f"{path} has {size} bytes where {begin} were written; it is not the file of this run")
        os.truncate(path, begin)
        self._file = open(path, "a", encoding="utf-8", errors="replace")
        self._writer = ThreadPoolExecutor(1, "samples")
        self._written: Future[None] | None = None

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows that nobody changes any more."""
        self._wait()
        self._written = self._writer.submit(self._write, list(rows))

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _wait(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def get_state(self) -> dict[str, int]:
        """Everything written so far is in the file from now on."""
        self._wait()
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell()}

    def close(self) -> None:
        self._writer.shutdown()
        self._file.close()
        self._wait()


class Pictures:
    """A folder of HASH.png, `most` at most: the first half of them stay, of the others the newest do.

    patch: side of a patch in pixels. Pictures of an earlier attempt count, by their age.
    """

    def __init__(self, folder: Path, most: int, patch: int) -> None:
        self._folder, self._patch, self._first = folder, patch, most // 2
        self._newest = most - self._first
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(folder.glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        self._names = [path.stem for path in there[: self._first]]
        self._later = collections.deque(path.stem for path in there[self._first :])

    def put(self, name: str, patches_PC: np.ndarray, yx_P2: np.ndarray) -> None:
        """Writes it if it is not there. name: its hash."""
        path = self._folder / f"{name}.png"
        if path.exists():
            return
        shown = [unpatchify(frame, yx_P2, self._patch) for frame in apart(patches_PC, self._patch)]
        part = path.with_suffix(".part")
        Image.fromarray(np.concatenate(shown, axis=1)).save(part, "PNG", compress_level=1)
        os.replace(part, path)
        if len(self._names) < self._first:
            self._names.append(name)
        else:
            self._later.append(name)
        while len(self._later) > self._newest:
            (self._folder / f"{self._later.popleft()}.png").unlink(missing_ok=True)
