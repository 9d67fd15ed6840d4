"""What stage 5 keeps of its rollouts beside the checkpoints: samples.jsonl and the pictures, see `rl.pipeline.samples`,
and trace.json, when each part of a step worked (`rl.pipeline.trace`).

cfg.rollout.samples: rows (whether anything is kept), pictures (how many at most) and groups (of each source, whose
pictures are written in a step). Files are written by threads, while training goes on.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from glmv_jax.data.records import Sample
from glmv_jax.parallel import multihost
from glmv_jax.rl.pipeline.samples import Pictures, SampleLog, prompt_rows
from glmv_jax.rl.pipeline.trace import Trace
from glmv_jax.rl.rollout import Rollout
from glmv_jax.typing import Batch

if TYPE_CHECKING:
    from glmv_jax.train.stages.rl import RL

Row = dict[str, Any]


class Samples:
    """Of one stage. run: its folder, None but in the first of several processes, which keeps its own.   folder: the
    same, None where nothing is kept.   trace: of the synchronous form (the pipeline has its own)."""

    def __init__(self, stage: RL) -> None:
        self._stage = stage
        kept = {"rows": True, "pictures": 2000, "groups": 2} | dict(stage.cfg.rollout.get("samples", {}))
        first = stage.cfg.faults and jax.process_index() == 0
        self.run: Path | Any = Path(stage.cfg.faults).parent if first else None
        self.folder = self.run if kept["rows"] else None
        self._most, self._groups = kept["pictures"], kept["groups"]
        self._pictures: Pictures | Any = None  # None before the first
        self._writer: ThreadPoolExecutor | None = None
        self._written: Future | None = None
        self.trace = Trace(keep=20_000)

    def open(self, data: Any) -> Kept:
        """The data with their log and trace."""
        self._stage.others.trace = self.trace
        return Kept(data, self.folder and self.folder / "samples.jsonl", self.trace)

    def show(self, records: Sequence[Rollout], batch: Batch) -> None:
        """Keeps pictures that records were drawn from; they are written while training goes on. batch: the prompts of
        those that are no episodes."""
        if self.folder is None or not self._most:
            return
        if self._writer is None:
            self._pictures = Pictures(self.folder / "pictures", self._most, self._stage.asker.patcher.patch)
            self._writer = ThreadPoolExecutor(1, "pictures")
        if self._written is not None:
            self._written.result()  # what went wrong with the last ones is said now
        self._written = self._writer.submit(self._write, self._some(records), batch)

    def _some(self, records: Sequence[Rollout]) -> list[Rollout]:
        """Those of the first groups of each source."""
        rows: dict[str, set[int]] = collections.defaultdict(set)
        for record in records:
            if len(rows[record.source]) < self._groups:
                rows[record.source].add(record.row)
        return [record for record in records if record.row in rows[record.source]]

    def _write(self, records: Sequence[Rollout], batch: Batch) -> None:
        for record in records:
            for name, image in zip(record.image_hash.split(","), record.images):
                self._pictures.put(name, *image)
        for row in {record.row for record in records if record.drawn is None}:
            for number, name in enumerate(batch["hashes"][row], start=1):
                at = batch["frame"][row] == number
                self._pictures.put(name, batch["patches"][row][at], batch["yx"][row][at])

    def close(self) -> None:
        """Waits for the pictures."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.shutdown()

    def asked(self, rows: Sequence[Row], records: Sequence[Rollout]) -> list[Row]:
        """What the groups of these rows of records were asked; of episodes what their environment said first."""
        said = lambda r: Sample(r.id, r.source, (), self._stage.tokenizer.decode(r.prompt).strip(), "")  # noqa: E731
        return prompt_rows(rows, [record.sample or said(record) for record in records])


def add_trained(
    rows: Sequence[Row], records: Sequence[Rollout], batches: Sequence[Batch], said: Sequence[Batch]
) -> None:
    """Adds "trained_logprobs" where the trainer has said them before the update (cfg.rollout.proximal); 0 for what was
    not drawn.

    rows: of the records. batches: their training rows, with "shown"; said: `Others.said_of` these.
    """
    # By the ids that were drawn, which records of one answer share.
    row_of = {id(record.answer): row for record, row in zip(records, rows, strict=True)}
    for batch, others in zip(batches, said):
        if "proximal" not in others:
            continue
        proximal_BT = multihost.own_rows(others["proximal"])
        for b, shown in enumerate(batch["shown"]):
            for record, _, own in shown:
                at = slice(own.stop - len(record.answer), own.stop)
                row_of[id(record.answer)]["trained_logprobs"] = proximal_BT[b, at].tolist()


@dataclasses.dataclass
class Kept:
    """A data iterator and the log of what was drawn from it, which go on together after a restart.   path: None for
    no log.   trace: gets the spans of what is between: rows are made from the last verdict on until they are kept, and
    trained on until the next data are asked for."""

    data: Any
    path: Path | None
    trace: Trace
    _log: SampleLog | None = None
    _state: Mapping[str, int] | None = None
    _took: tuple[str, float] | None = None  # what is trained on, and since when

    def __next__(self) -> Any:
        if self._took is not None:
            self.trace.add("train", *self._took)
        self._took = None
        return next(self.data)

    def keep(self, rows: Sequence[Row]) -> None:
        name = f"step {rows[0]['step']}" if rows else ""
        drawn = [span.end for span in self.trace.spans if span.stage in ("rollout", "reward")]
        self.trace.add("batch", name, max(drawn, default=self.trace.clock()))
        self._took = name, self.trace.clock()
        if self.path is not None:
            self._log = self._log or SampleLog(self.path, self._state)
            self._log.write(rows)

    def get_state(self) -> dict[str, Any]:
        self._save_trace()
        return {"data": self.data.get_state(), "samples": self._log.get_state() if self._log else self._state}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.data.set_state(state["data"])
        self._state = state["samples"]

    def close(self) -> None:
        try:
            self.data.close()
        finally:
            if self._log is not None:
                self._log.close()
                self._save_trace()

    def _save_trace(self) -> None:
        if self._log is not None and self.path is not None:
            self.trace.save(self.path.parent / "trace.json")
