"""What stages 3 and 4 read beside, or in place of, the built-in generators: documents and conversations on disk.

`data` of the config, beside what `VLMStage` reads:

    sources         {name: {path, reader, weight, category, long}}, see `data.local`; none: the generators alone
    weights         of the generators, on the same scale as the sources' weights; empty or 0: without them
    gui             weights of `data.gui`'s kinds of records about drawn windows, on that scale too
    power           sources are read as weight * records^power: 0 by weight alone
    heldout         share of the sources' records that is kept for evaluation; 0: none, and nothing is said of them
    thinking        which thinking of a conversation is kept: last, each, all, none, see `data.conversation`
    video           rows hold films: every patch has as many frames as the tower's, so pixels take that much more memory
    film_patches, film_frames   of a pair of frames, and of a film, at most
    fit, ahead      how rows are filled, see `data.packing`
    slices          into how many slices a row's patches are cut, for a mesh's context axis, see `data.partition`
    dispatch        rows, patches: of the encoder's own, spread over all devices, see `train.stages.dispatching`

Without sources batches are those of `VLMStage`, to the last bit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from ml_collections import ConfigDict

from glmv_jax.data import gui, local, packing
from glmv_jax.data.building import Document
from glmv_jax.data.dialect import COMPACT, OF_FAMILY, Dialect
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.local import pipeline
from glmv_jax.data.local.assembling import Assembler
from glmv_jax.data.partition import Slices
from glmv_jax.data.stream import Stream
from glmv_jax.train import exchange
from glmv_jax.train.stages.base import DataIterator
from glmv_jax.train.stages.mim import reading
from glmv_jax.train.stages.vlm import VLMStage
from glmv_jax.train.state import Placement, TrainState
from glmv_jax.typing import Batch, Params, UserError


class FromFiles(VLMStage):
    """A stage of the language model whose documents may come from a person's own files."""

    def __init__(self, cfg: ConfigDict) -> None:
        super().__init__(cfg)
        d = cfg.data
        self.files = {name: local.Source.of(name, entry) for name, entry in d.get("sources", {}).items()}
        if both := sorted(set(self.files) & set(d.weights)):
            raise UserError(f"data.sources.{both[0]} has the name of a generator; call it otherwise")
        self.gui = {kind: weight for kind, weight in d.get("gui", {}).items() if weight}
        if not self.files and not self.gui and not any(d.weights.values()):
            raise UserError("there are neither data.sources nor data.weights; give one of them")
        for source in self.files.values():
            source.files()  # a path that is wrong is said now
        self.windows("train")  # as is a kind that does not exist
        self.names = [*self.names, *map(_gui, self.gui), *self.files]
        frames = self.model.vision.temporal_patch if d.get("video", False) else 1
        self.builder = dataclasses.replace(
            self.builder, patcher=dataclasses.replace(self.builder.patcher, frames=frames)
        )

    @functools.cached_property
    def assembler(self) -> Assembler:
        """Records to documents of this stage's rows."""
        d = self.cfg.data
        return Assembler(
            self.builder, thinking=d.thinking, film_patches=d.film_patches, film_frames=d.film_frames,
            log=FaultLog(self.cfg.faults or None), dialect=self._dialect,
        )  # fmt: skip

    @property
    def _dialect(self) -> Dialect:
        """That of the public checkpoint which the model is of, as its own template writes it; else GLM-5's."""
        public = self.cfg.model.get("checkpoint", "")
        return OF_FAMILY.get(exchange.family(public), COMPACT) if public else COMPACT

    def windows(self, split: str) -> dict[str, gui.Windows]:
        """Sources of records about windows, by name."""
        return {_gui(kind): gui.Windows(kind, split, self.data_seed if split == "train" else 1) for kind in self.gui}

    def train_data(self) -> DataIterator:
        if not self.files and not self.gui:
            return super().train_data()
        d = self.cfg.data
        weights = dict(d.weights) | {_gui(kind): weight for kind, weight in self.gui.items()}
        return pipeline.batches(
            self.files, self.sources("train", self.data_seed), weights, self.assembler, form=self.form,
            batch=self.own_rows, records=self.windows("train"), power=d.power, heldout=d.heldout,
            packing=pipeline.Packing(d.fit, d.ahead, Slices(d.get("slices", 1)), self.encoder()),
            reading=reading(self.cfg),
        )  # fmt: skip

    def next_batch(self, data: DataIterator, state: TrainState) -> tuple[Batch, dict[str, float]]:
        batch, metrics = super().next_batch(data, state)
        if "split" not in batch:  # of the generators alone
            return batch, metrics
        trimmed = {f"documents/{how}": float(batch.pop(how).sum()) for how in packing.TRIMMED}
        filled = {f"filled/{name}": share for name, share in packing.efficiency(batch).items()}
        return batch, metrics | trimmed | filled

    def begin(self, placement: Placement, constants: Params, extra: Params, *, fresh: bool) -> Params:
        _ = self._heldout_records  # where nothing is held out, that is said before anything is compiled
        return super().begin(placement, constants, extra, fresh=fresh)

    # ------------------------------------------------------------------------------------------------- evaluation
    @functools.cached_property
    def _heldout_records(self) -> dict[str, list[Batch]]:
        """Held-out batches of each source of records."""
        d, limit, log = self.cfg.data, self.cfg.eval.documents, FaultLog(self.cfg.faults or None)
        made = dataclasses.replace(self.assembler, builder=dataclasses.replace(self.builder, per="token"))
        found = {}
        for name, source in self.windows("heldout").items():
            documents = [document for i in range(limit) for document in made.documents(source[i])]
            found[name] = [dataclasses.replace(document, source=name) for document in documents]
        if d.get("heldout", 0.0):
            for name, source in self.files.items():
                found[name] = pipeline.heldout_documents(name, source, made, d.heldout, limit, log)
        return {name: self._packed(documents, log) for name, documents in found.items() if documents}

    def _packed(self, documents: list[Document], log: FaultLog) -> list[Batch]:
        b = self.builder
        return list(iter(packing.PackIterDataset(
            Stream(documents), tokens=b.max_tokens, patches=b.max_patches, channels=b.patcher.channels,
            rows=self.cfg.batch, names=self.names, log=log, targets=b.max_targets, images=b.max_images,
        )))  # fmt: skip

    def evaluate(self, params: Params, extra: Params, *, full: bool) -> dict[str, float]:
        return super().evaluate(params, extra, full=full) if self.cfg.eval.kinds else self.heldout_loss(params)

    def notes(self) -> dict[str, dict[str, Any]]:
        return super().notes() if self.cfg.eval.kinds else {}

    def heldout_loss(self, params: Params) -> dict[str, float]:
        """As of the generators, and for each source "heldout loss/<name>", with the images and without."""
        result = super().heldout_loss(params) if self.cfg.eval.kinds else {}
        for name, batches in self._heldout_records.items():
            for seen, suffix in ((True, ""), (False, " without image")):
                result[f"heldout loss/{name}{suffix}"] = self.measured(params, batches, seen=seen)["loss"]
        return result


def _gui(kind: str) -> str:
    """The source's name of a kind of records about windows."""
    return f"gui_{kind}"
