"""Stage 2, SigLIP: images and their names in two languages meet in one space, at native sizes and aspect ratios
(section 2.1 of the report).

The length of the image rows may change from step to step (NaFlex); the global batch never does. What does not fit is
embedded some rows at a time, with the gradient of the whole batch (`parallel.micro`), and the loss has forms for many
devices (`losses.sigmoid`).

Pairs are the shipped corpus, or with `data.sources` what lies on disk (`data.pairs`); a share of that is held out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from glmv_jax import models
from glmv_jax.data import emoji, heldout, image_text, pairs
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.text_rows import TextRows
from glmv_jax.eval import probes, towers
from glmv_jax.eval.samples import SampleWriter
from glmv_jax.losses.sigmoid import sigmoid_loss
from glmv_jax.models import two_tower
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.micro import in_pieces, pieces_for
from glmv_jax.train import text_towers
from glmv_jax.train.stages.base import DataIterator, Stage, rows_by_source
from glmv_jax.train.stages.mim import knn_probe, reading
from glmv_jax.train.stages.suite import SuiteLook
from glmv_jax.typing import Axes, Batch, Params, UserError, VisionInput

QUERIES = ("en name", "zh name", "zh name+keywords")
EVAL_ROWS = 256  # held-out rows that are embedded at a time


class SigLIP(Stage):
    name = "siglip"
    host_only = ("source",)

    def __init__(self, cfg: ConfigDict) -> None:
        super().__init__(cfg)
        self.model = text_towers.model(cfg)
        self.row_length = self.model.text.row_length(2 if cfg.data.both_languages else 1)
        v = self.model.vision
        self._image = jax.jit(lambda p, v: two_tower.embed_image(self.model, p, v))
        self._text = jax.jit(lambda p, t: two_tower.embed_text(self.model, p, t))
        self.patcher = Patcher(patch=v.patch, temporal=v.temporal_patch, max_patches=cfg.eval.patches)
        self.suite = SuiteLook(self)
        d = cfg.data
        if len(d.lengths) != len(d.length_shares) or len(set(d.lengths)) != len(d.lengths):
            raise UserError(
                f"data.lengths={d.lengths} and data.length_shares={d.length_shares}: give each once, with a share"
            )
        self.shape_buckets = len(d.lengths)
        self.sources = {name: pairs.Source.of(name, entry) for name, entry in d.get("sources", {}).items()}
        if self.sources and d.basics:
            raise UserError("data.basics is a share of the shipped corpus; with data.sources set data.basics=0")
        for source in self.sources.values():
            source.files()  # a path that is wrong is said now

    @functools.cached_property
    def tokenizer(self) -> TextRows:
        """Texts as rows. Made when first used: compiling for a mesh needs no vocabulary."""
        return text_towers.rows(self.cfg, self.model.text)

    # ------------------------------------------------------------------------------------------------- step
    def init_params(self, key: jax.Array) -> Params:
        return models.init_params(self.model, key)

    def given_params(self) -> Params:
        _ = self.tokenizer  # a vocabulary that does not fit is found before anything is allocated
        return text_towers.params(self.cfg)

    def logical_axes(self) -> Axes:
        return models.logical_axes(self.model)

    def loss(
        self, params: Params, constants: Params, extra: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
        vision = VisionInput(batch["patches"], batch["yx"], batch["frame"])
        texts, N = (batch["tokens"], batch["segments"]), batch["lang"].shape[1]
        image_BE = self._embedded(lambda rows: two_tower.embed_image(self.model, params, rows), vision)
        text_BNE = self._embedded(lambda rows: two_tower.embed_texts(self.model, params, rows[0], rows[1], N), texts)
        log_scale, bias = two_tower.scale(self.model, params)
        c = self.cfg.loss
        loss, metrics = sigmoid_loss(
            image_BE, text_BNE, log_scale, bias, batch["concept"], impl=c.impl, mesh=rules_lib.active_mesh(),
            chunk=c.chunk, wire=c.wire,
        )  # fmt: skip
        return loss, (metrics, extra)

    def _embedded(self, embed: Callable, rows: Any) -> jax.Array:
        """embed(rows), as many rows at a time as `loss.positions` allows a device, whatever the batch."""
        B, length = jax.tree.leaves(rows)[0].shape[:2]
        shards = mesh_lib.data_shards(rules_lib.active_mesh())
        return in_pieces(embed, rows, pieces_for(B, shards, length, self.cfg.loss.positions))

    # ------------------------------------------------------------------------------------------------- data
    def train_data(self) -> DataIterator:
        d = self.cfg.data
        shared = dict(
            batch=self.own_rows, lengths=dict(zip(d.lengths, d.length_shares)), text_length=self.row_length,
            chinese=None if d.both_languages else d.chinese, reading=reading(self.cfg),
        )  # fmt: skip
        if self.sources:
            unseen = {concept for held in self.heldout_sets for concept in held.concept.tolist()}
            return image_text.pair_batches(
                self.sources, self.tokenizer, self.patcher, heldout=d.heldout, unseen=unseen, **shared
            )
        return image_text.siglip_batches(
            emoji.Pairs("train", self.cfg.seed), self.tokenizer, self.patcher, texts=dict(d.texts), basics=d.basics,
            **shared,
        )  # fmt: skip

    def batch_shapes(self) -> Iterable[Batch]:
        B, T, N = self.own_rows, self.row_length, 2 if self.cfg.data.both_languages else 1
        ints = {"tokens": (B, T), "segments": (B, T), "concept": (B,), "lang": (B, N)}
        for P in self.cfg.data.lengths:
            shapes = {name: jax.ShapeDtypeStruct(s, np.int32) for name, s in ints.items()}
            vision = {"patches": ((B, P, self.patcher.channels), np.uint8), "yx": ((B, P, 2), np.int32)}
            yield shapes | {name: jax.ShapeDtypeStruct(*s) for name, s in vision.items()} | {
                "frame": jax.ShapeDtypeStruct((B, P), np.int32)}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch["tokens"]), "tokens": batch["frame"].size + batch["tokens"].size}

    def counts_by_source(self, batch: Batch) -> dict[str, dict[str, int]]:
        """Tokens as in `counts`: patches and tokens of a row, padding among them."""
        names = list(self.sources) or image_text.SHIPPED
        return rows_by_source(names, batch["source"], batch["frame"].shape[1] + batch["tokens"].shape[1])

    def flops(self, batch: Batch) -> float:
        B, T = batch["tokens"].shape
        return 3 * B * (self.model.vision.flops(batch["frame"].shape[1]) + self.model.text.flops(T))

    # ------------------------------------------------------------------------------------------------- evaluation
    def evaluate(self, params: Params, extra: Params, *, full: bool) -> dict[str, float]:
        """Retrieval among held-out pairs, both ways; the nearest-neighbour probe of the trunk."""
        metrics: dict[str, float] = {}
        for held, image_NE, text_NE in self._embed(params):
            for query in text_NE:
                found = probes.recall(probes.ranks(text_NE[query], image_NE, held.concept))
                back = probes.recall(probes.ranks(image_NE, text_NE[query], held.concept))
                metrics |= {f"{query} -> image {k}": v for k, v in found.items()}
                metrics |= {f"image -> {query} {k}": v for k, v in back.items()}
        if full:
            metrics["knn"] = knn_probe(self.model.vision, params["vision"])
        return metrics | self.suite(params, full)

    def as_towers(self, *, patches: int = 0, batch: int = 256) -> towers.Towers:
        patcher = dataclasses.replace(self.patcher, max_patches=patches or self.patcher.max_patches)
        return towers.of_two_tower(self.model, self.tokenizer, patcher, *self.place(), batch)

    @functools.cached_property
    def heldout_sets(self) -> list[heldout.HeldoutPairs]:
        """Sets of held-out pairs: the shipped corpus', or of the sources one a language."""
        cfg, options = self.cfg, (self.tokenizer, self.patcher, self.model.text.length)
        if not self.sources:
            return [heldout.heldout_pairs(*options)]
        log = FaultLog(cfg.faults or None)
        found = heldout.source_pairs(self.sources, *options, share=cfg.data.heldout, limit=cfg.eval.pairs, log=log)
        return list(found.values())

    def _embed(self, params: Params) -> Iterator[tuple]:
        """(pairs, image embeddings, text embeddings by query) of each held-out set."""
        for held in self.heldout_sets:
            vision = VisionInput(*(held.vision[k] for k in ("patches", "yx", "frame")))
            texts = {q: _in_chunks(lambda t: self._text(params, t), held.texts[q]) for q in _queries(held)}
            yield held, _in_chunks(lambda v: self._image(params, v), vision), texts

    def notes(self) -> dict[str, dict[str, Any]]:
        n = emoji.HELD_OUT
        notes = {"knn": {"chance": 1.0 / n, "note": f"which of {n} held-out concepts, 5 neighbours"}}
        for held in self.heldout_sets:
            names = [name for q in _queries(held) for name in (f"{q} -> image", f"image -> {q}")]
            about = f"{len(held.ids)} held-out pairs" if self.sources else "held-out concepts"
            at = probes.chance(held.concept)
            notes |= {f"{name} {k}": {"chance": v, "note": about} for name in names for k, v in at.items()}
        return notes

    def write_samples(self, params: Params, extra: Params, folder: Path) -> None:
        """For a few held-out queries in each language, the five nearest images."""
        writer = SampleWriter(folder)
        for held, image_NE, text_NE in self._embed(params):
            for query in {query[:2]: query for query in text_NE}.values():  # of each language the last
                lang = query[:2]
                scores_NN = text_NE[query] @ image_NE.T
                for i in np.random.default_rng(0).permutation(len(held.ids))[:12].tolist():
                    order = np.argsort(-scores_NN[i])[:5].tolist()
                    writer.add(
                        kind="retrieval", id=held.ids[i], source="retrieval", query=held.names[lang][i], lang=lang,
                        images=[writer.image(held.ids[j], held.images[j]) for j in order],
                        gold=order.index(i) if i in order else None, correct=order[0] == i,
                    )  # fmt: skip


def _queries(held: heldout.HeldoutPairs) -> list[str]:
    return [query for query in QUERIES if query in held.texts]


def _in_chunks(embed: Callable, rows: Any) -> np.ndarray:
    """embed(rows) as an array of the host, EVAL_ROWS rows at a time; the last ones are filled up with the first."""
    n = jax.tree.leaves(rows)[0].shape[0]
    if n <= EVAL_ROWS:
        return np.asarray(embed(rows))
    chunks = np.arange(-(-n // EVAL_ROWS) * EVAL_ROWS).reshape(-1, EVAL_ROWS) % n
    take = lambda chunk: jax.tree.map(lambda x: x[chunk], rows)  # noqa: E731
    return np.concatenate([np.asarray(embed(take(chunk))) for chunk in chunks])[:n]
