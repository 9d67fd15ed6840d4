"""Stage 1, masked image modelling: predict two teachers' features at masked patches (section 2.1 of the report).

Ratio (35 %), resolution, teachers' roles and the 80/10/10 mixture are the paper's. Mask shape, heads, loss form and
weights are not in it; ours follow the spec of each module and are all in the config.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from glmv_jax import models
from glmv_jax.data import emoji, files, images, pipeline
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.pipeline import concept_number, vision_row
from glmv_jax.eval import probes
from glmv_jax.losses import distill
from glmv_jax.models import build, cogvit, mim
from glmv_jax.train import teachers
from glmv_jax.train.stages.base import Stage
from glmv_jax.typing import UserError, VisionInput


def reading(cfg: ConfigDict) -> pipeline.Reading:
    """This process' share of the data, in the order that the run's seed gives."""
    return pipeline.Reading(
        seed=cfg.seed, shard=jax.process_index(), shards=jax.process_count(), workers=cfg.data.workers,
        faults=cfg.faults or None,
    )  # fmt: skip


class MIM(Stage):
    name = "mim"

    def __init__(self, cfg: ConfigDict) -> None:
        super().__init__(cfg)
        if cfg.loss.on not in ("masked", "all"):
            raise UserError(f"loss.on={cfg.loss.on!r} is not known; choose masked or all")
        vision = build.vision(cfg.model)
        self.teachers = [teachers.make(name, t, vision, cfg.data.size) for name, t in cfg.teachers.items()]
        features = tuple((t.name, t.channels) for t in self.teachers)
        self.model = mim.MIMConfig(vision, mim.HeadsConfig(vision.width, cfg.loss.head_hidden, features, vision.dtype))
        self.sources = {name: self._source(name, cfg.data.sources[name]) for name in cfg.data.weights}

    def _source(self, name: str, path: str):
        """A part of the shipped corpus, or pictures on disk."""
        if path:
            return files.ImageFiles(path, FaultLog(self.cfg.faults or None))
        return images.Images(name, "train", self.cfg.seed)

    # ------------------------------------------------------------------------------------------------- step
    def init_params(self, key):
        return models.init_params(self.model, key)

    def logical_axes(self):
        return models.logical_axes(self.model)

    def constants(self):
        return {t.name: t.params for t in self.teachers}

    def constant_axes(self):
        return {t.name: t.axes for t in self.teachers}

    def init_extra(self):
        return {"stats": {t.name: distill.init_stats(t.channels) for t in self.teachers}}

    def loss(self, params, constants, extra, batch, key):
        target, stats = {}, {}
        for teacher in self.teachers:
            features_BPC = jax.lax.stop_gradient(teacher.apply(constants[teacher.name], batch["image"]))
            stats[teacher.name] = distill.update_stats(extra["stats"][teacher.name], features_BPC)
            target[teacher.name] = distill.standardise(features_BPC, stats[teacher.name])
        vision = VisionInput(batch["patches"], batch["yx"], batch["frame"])
        predicted = mim.apply(self.model, params, vision, batch["mask"])
        where = batch["mask"] if self.cfg.loss.on == "masked" else batch["frame"] > 0
        weights = {name: t.weight for name, t in self.cfg.teachers.items()}
        terms = {name: self.cfg.loss[name] for name in ("cosine", "smooth_l1", "mse")}
        loss, metrics = distill.distill_loss(predicted, target, where, weights, **terms)
        return loss, (metrics, {"stats": stats})

    # ------------------------------------------------------------------------------------------------- data
    def _batches(self, sources, reading, batch):
        d, v = self.cfg.data, self.model.vision
        return pipeline.mim_batches(
            sources, dict(d.weights), batch=batch, size=d.size, patch=v.patch, mask_ratio=d.mask_ratio,
            mask_kind=d.mask_kind, crop_scale=d.crop_scale, reading=reading,
        )  # fmt: skip

    def train_data(self):
        return self._batches(self.sources, reading(self.cfg), self.own_rows)

    def counts(self, batch):
        return {"samples": len(batch["patches"]), "tokens": batch["frame"].size}

    def flops(self, batch):
        B, P = batch["frame"].shape
        return B * (3 * self.model.flops(P) + sum(t.flops for t in self.teachers))

    # ------------------------------------------------------------------------------------------------- evaluation
    def evaluate(self, params, extra, *, full: bool):
        """Held-out loss, and a nearest-neighbour probe of the trunk: which held-out emoji concept is it?"""
        metrics = self._heldout_loss(params, extra)
        return metrics | {"knn": knn_probe(self.model.vision, params["vision"])}

    def _heldout_loss(self, params, extra):
        if not hasattr(self, "_heldout"):
            sources = {name: images.Images(name, "heldout", 1) for name in self.cfg.data.weights}
            data = self._batches(sources, pipeline.Reading(seed=1, ahead=0), self.cfg.batch)
            self._heldout = [next(data) for _ in range(self.cfg.eval.batches)]
            self._loss = jax.jit(self.loss)
            # An untrained run has no statistics yet: the teachers' on the held-out images stand in for them, so that
            # the first number is comparable with the last.
        constants = self.constants()
        results = [self._loss(params, constants, extra, batch, jax.random.key(0)) for batch in self._heldout]
        rows = [{"loss": loss, **metrics} for loss, (metrics, _) in results]
        return {f"heldout/{k}": float(np.mean([r[k] for r in rows])) for k in rows[0]}

    def notes(self):
        classes = len({concept_number(i) for i in _heldout_ids()})
        notes = {"knn": {"chance": 1.0 / classes, "note": f"which of {classes} held-out concepts, 5 neighbours"}}
        for t in self.teachers:
            notes[f"heldout/{t.name}/loss"] = {"chance": None, "note": f"masked patches; teacher: {t.about}"}
        return notes


def _heldout_ids() -> list[str]:
    return [emoji.load()[i].id for i in emoji.split("heldout")]


def knn_probe(vision: cogvit.CogViTConfig, params, views: int = 4, k: int = 5) -> float:
    """Accuracy of naming the concept of `views` augmented views of each held-out emoji by their neighbours among as
    many other views; mean-pooled trunk features, nothing trained."""
    patcher = Patcher(patch=vision.patch, temporal=vision.temporal_patch)
    ids = _heldout_ids()
    labels = np.array([concept_number(i) for i in ids])
    embed = jax.jit(lambda v: _pooled(cogvit.apply(vision, params, v), v.frame))

    def view(seed: int) -> np.ndarray:
        rng = np.random.default_rng([7, seed])
        pictures = [emoji.augmented(i, rng) for i in emoji.split("heldout")]
        rows = [vision_row(*patcher(p), patcher.max_patches) for p in pictures]
        batch = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
        return np.asarray(embed(VisionInput(batch["patches"], batch["yx"], batch["frame"])))

    gallery, asked = (np.concatenate([view(seed) for seed in range(first, first + views)]) for first in (0, views))
    labels = np.tile(labels, views)
    return float((probes.knn(gallery, labels, asked, k) == labels).mean())


def _pooled(x_BPD, frame_BP):
    weight = (frame_BP > 0).astype(jnp.float32)[..., None]
    return (x_BPD * weight).sum(1) / weight.sum(1)
