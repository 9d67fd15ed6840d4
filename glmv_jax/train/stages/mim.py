"""Stage 1, masked image modelling: predict two teachers' features at masked patches (section 2.1 of the report).

Ratio (35 %), resolution, teachers' roles and the 80/10/10 mixture are the paper's. Mask shape, heads, loss form and
weights are not in it; ours follow the spec of each module and are all in the config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from glmv_jax import models
from glmv_jax.data import crops, emoji, files, images, pipeline
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.features import FORMAT, FeatureCache
from glmv_jax.data.image_text import concept_number
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.pipeline import vision_row
from glmv_jax.eval import probes, towers
from glmv_jax.losses import distill, phi_s
from glmv_jax.models import build, cogvit, mim
from glmv_jax.models.teachers import Teacher
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import teachers
from glmv_jax.train.stages.base import DataIterator, Stage, rows_by_source
from glmv_jax.train.stages.suite import SuiteLook
from glmv_jax.train.state import Placement
from glmv_jax.typing import Axes, Batch, Params, UserError, VisionInput

KEPT = 2**30  # bytes of held-out batches that are read once and kept; more are read for each evaluation
SPLITS = ("train", "heldout")


def reading(
    cfg: ConfigDict, split: str = "train", host: int | None = None, hosts: int | None = None
) -> pipeline.Reading:
    """A host's share of the data (of this process, if not given), in the order that the run's seed gives.

    Held-out data do not depend on that seed.
    """
    return pipeline.Reading(
        seed=cfg.seed if split == "train" else 1, shard=jax.process_index() if host is None else host,
        shards=hosts or jax.process_count(), workers=cfg.data.workers, faults=cfg.faults or None,
    )  # fmt: skip


def _identity(source: Any) -> str:
    """Which pictures a source has, in words."""
    if isinstance(source, images.Images):
        return f"the shipped corpus ({source.split})"
    ids = hashlib.sha256("\0".join(source.ids()).encode(errors="surrogateescape")).hexdigest()
    return f"{len(source)} pictures ({ids[:16]})"


class MIM(Stage):
    name = "mim"

    def __init__(self, cfg: ConfigDict, make: Callable = teachers.make) -> None:
        """make: how a teacher is had; `teachers.abstract` to compile a step without weights."""
        super().__init__(cfg)
        self._make = make
        if cfg.loss.on not in ("masked", "all"):
            raise UserError(f"loss.on={cfg.loss.on!r} is not known; choose masked or all")
        if not cfg.teachers:
            raise UserError("stage 1 has no teacher; leave at least one in teachers")
        self.normalise = {name: t.get("normalise", "channel") for name, t in cfg.teachers.items()}
        for name, how in self.normalise.items():
            if how not in ("channel", "phi_s"):
                raise UserError(f"teachers.{name}.normalise={how!r} is not known; choose channel or phi_s")
        vision = build.vision(cfg.model)
        folder = cfg.data.get("teacher_cache", "")
        self.cache = FeatureCache(folder) if folder else None
        self.teachers = [self._teacher(name, t, vision) for name, t in cfg.teachers.items()]
        features = tuple((t.name, t.channels) for t in self.teachers)
        self.model = mim.MIMConfig(vision, mim.HeadsConfig(vision.width, cfg.loss.head_hidden, features, vision.dtype))
        self.suite = SuiteLook(self)
        parts = {name: self._source(name, cfg.data.sources[name]) for name in cfg.data.weights}
        self.sources = {split: {name: part[i] for name, part in parts.items()} for i, split in enumerate(SPLITS)}
        if self.cache:
            self.cache.check(self.facts(jax.process_count()))
            asked, there = cfg.eval.batches * cfg.batch // jax.process_count(), self.cache.items["heldout"]
            if asked > there:
                raise UserError(f"the teacher cache {folder} holds {there} held-out crops, eval.batches of this batch "
                                f"take {asked}; run glmv cache-teachers with these values, it adds what is missing")
        self._begun: tuple[Placement, Params] | None = None
        self._kept: list[Any] = []

    def _teacher(self, name: str, entry: ConfigDict, vision: cogvit.CogViTConfig) -> Teacher:
        """One that runs, or one that the cache knows; then its weights are compared if they are here."""
        if self.cache is None:
            return self._make(name, entry, vision, self.cfg.data.size)
        weights = None
        if entry.kind == "hog" or entry.path:
            weights = teachers.digest(self._make(name, entry, vision, self.cfg.data.size).params)
        self.cache.check(teachers.facts(name, entry, weights))
        return teachers.stored(name, self.cache.teachers[name], str(self.cache.path))

    def _source(self, name: str, path: str) -> tuple[Any, Any]:
        """Training and held-out part: of pictures on disk, or of the shipped corpus."""
        if not path:
            return images.Images(name, "train", self.cfg.seed), images.Images(name, "heldout", 1)
        share = self.cfg.data.get("heldout", 0.0)
        if not 0.0 <= share < 1.0:
            raise UserError(f"data.heldout={share} is no share of the pictures; give a number from 0 to below 1")
        pictures = files.ImageFiles(path, FaultLog(self.cfg.faults or None))
        return pictures.split(share) if share else (pictures, images.Images(name, "heldout", 1))

    def facts(self, hosts: int) -> dict[str, Any]:
        """What the crops of each host depend on."""
        d = self.cfg.data
        facts = {"format": FORMAT, "seed": self.cfg.seed, "hosts": hosts, "data.size": d.size,
                 "model.vision.patch": self.model.vision.patch, "data.crop_scale": tuple(d.crop_scale),
                 "data.weights": dict(d.weights)}  # fmt: skip
        for split, sources in self.sources.items():
            facts |= {f"{split} pictures of {name}": _identity(source) for name, source in sources.items()}
        return facts

    # ------------------------------------------------------------------------------------------------- step
    def init_params(self, key: jax.Array) -> Params:
        return models.init_params(self.model, key)

    def logical_axes(self) -> Axes:
        return models.logical_axes(self.model)

    def constants(self) -> Params:
        return {t.name: t.params for t in self.teachers}

    def constant_axes(self) -> Axes | None:
        return {t.name: t.axes for t in self.teachers}

    def init_extra(self) -> Params:
        start = {"channel": distill.init_stats, "phi_s": phi_s.init}
        return {"stats": {t.name: start[self.normalise[t.name]](t.channels) for t in self.teachers}}

    def begin(self, placement: Placement, constants: Params, extra: Params, *, fresh: bool) -> Params:
        self._begun = placement, constants
        turned = [t for t in self.teachers if self.normalise[t.name] == "phi_s"]
        if not (fresh and turned):
            return extra
        print(f"{self.name}: statistics for PHI-S from {self.cfg.loss.calibration} batches", flush=True)
        seen = self._moments(turned, placement, constants)
        fitted = {t.name: phi_s.fit(seen[t.name]) for t in turned}
        if jax.process_count() > 1:  # one host's rounding for all
            fitted = multihost_utils.broadcast_one_to_all(fitted)
        return {"stats": extra["stats"] | jax.device_put(fitted, placement.replicated)}

    def _moments(self, turned: Any, placement: Placement, constants: Params) -> dict[str, phi_s.Moments]:
        """Of the features of the first batches, the same that training begins with."""
        moments = jax.jit(lambda constants, batch: {
            t.name: phi_s.batch_moments(self._features(t, constants, batch)) for t in turned
        }, out_shardings=placement.replicated)  # fmt: skip
        seen: dict[str, phi_s.Moments] = {}
        with contextlib.closing(self.train_data()) as data, rules_lib.use(placement.mesh, placement.rules):
            for _ in range(self.cfg.loss.calibration):
                batch = placement.batch(next(data))
                found = {k: batch[k] for k in ("image", "features") if k in batch}
                rows = batch["frame"].size
                for name, (mean, scatter) in jax.device_get(moments(constants, found)).items():
                    new = phi_s.Moments(float(rows), np.asarray(mean, np.float64), np.asarray(scatter, np.float64))
                    seen[name] = seen[name] + new if name in seen else new
        return seen

    def _features(self, teacher: Teacher, constants: Params, batch: Batch) -> jax.Array:
        """[B, P, C] of one teacher, live or stored."""
        if self.cache is not None:
            return batch["features"][teacher.name].astype(jnp.float32)
        with jax.named_scope("teacher"):
            return jax.lax.stop_gradient(teacher.apply(constants[teacher.name], batch["image"]))

    def loss(
        self, params: Params, constants: Params, extra: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
        target, stats = {}, {}
        for teacher in self.teachers:
            name, old = teacher.name, extra["stats"][teacher.name]
            features_BPC = self._features(teacher, constants, batch)
            if self.normalise[name] == "phi_s":
                stats[name], target[name] = old, phi_s.apply(features_BPC, old)
            else:
                stats[name] = distill.update_stats(old, features_BPC)
                target[name] = distill.standardise(features_BPC, stats[name])
        vision = VisionInput(batch["patches"], batch["yx"], batch["frame"])
        predicted = mim.apply(self.model, params, vision, batch["mask"])
        where = batch["mask"] if self.cfg.loss.on == "masked" else batch["frame"] > 0
        weights = {name: t.weight for name, t in self.cfg.teachers.items()}
        terms = {name: self.cfg.loss[name] for name in ("cosine", "smooth_l1", "mse")}
        loss, metrics = distill.distill_loss(predicted, target, where, weights, **terms)
        return loss, (metrics, {"stats": stats})

    # ------------------------------------------------------------------------------------------------- data
    def batches(self, split: str, reading: pipeline.Reading, batch: int, *, keys: bool = False) -> Any:
        """Crops of a split in the order that the reading gives. keys: for a cache, see `crops.mim_batches`."""
        d, v = self.cfg.data, self.model.vision
        stored = crops.Stored(self.cache, tuple(t.name for t in self.teachers), split) if self.cache else None
        return crops.mim_batches(
            self.sources[split], dict(d.weights), batch=batch, size=d.size, patch=v.patch, mask_ratio=d.mask_ratio,
            mask_kind=d.mask_kind, crop_scale=d.crop_scale, reading=reading, keys=keys, stored=stored,
        )  # fmt: skip

    def train_data(self) -> DataIterator:
        return self.batches("train", reading(self.cfg), self.own_rows)

    def batch_shapes(self) -> Iterable[Batch]:
        if self.cache is not None:  # its features are known when they are read
            return
        B, size, v = self.own_rows, self.cfg.data.size, self.model.vision
        P, shape = (size // v.patch) ** 2, jax.ShapeDtypeStruct
        yield {
            "patches": shape((B, P, v.channels * v.patch**2), np.uint8), "yx": shape((B, P, 2), np.int32),
            "frame": shape((B, P), np.int32), "mask": shape((B, P), np.bool_), "source": shape((B,), np.int32),
            "image": shape((B, size, size, v.channels), np.uint8),
        }  # fmt: skip

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch["patches"]), "tokens": batch["frame"].size}

    def counts_by_source(self, batch: Batch) -> dict[str, dict[str, int]]:
        """Of a cache's crops too, which say where they are from as those that are made."""
        return rows_by_source(list(self.sources["train"]), batch["source"], batch["frame"].shape[1])

    def flops(self, batch: Batch) -> float:
        B, P = batch["frame"].shape
        return B * (3 * self.model.flops(P) + sum(t.flops for t in self.teachers))

    # ------------------------------------------------------------------------------------------------- evaluation
    def evaluate(self, params: Params, extra: Params, *, full: bool) -> dict[str, float]:
        """Held-out loss, and a nearest-neighbour probe of the trunk: which held-out emoji concept is it?"""
        metrics = self._heldout_loss(params, extra)
        metrics["knn"] = knn_probe(self.model.vision, params["vision"])
        return metrics | self.suite(params, full)

    def as_towers(self, *, patches: int = 0, batch: int = 256) -> towers.Towers:
        """The trunk for `eval.datasets`; pictures get as many patches as in training unless `patches` says else."""
        v = self.model.vision
        budget = patches or (self.cfg.data.size // v.patch) ** 2
        patcher = Patcher(patch=v.patch, temporal=v.temporal_patch, max_patches=budget)
        return towers.of_trunk(v, patcher, *self.place(), batch)

    def _heldout_loss(self, params: Params, extra: Params) -> dict[str, float]:
        placement, constants = self._begun or (None, self.constants())
        # An untrained run has no statistics yet: the teachers' on the held-out images stand in for them, so that the
        # first number is comparable with the last.
        with rules_lib.use(placement.mesh, placement.rules) if placement else contextlib.nullcontext():
            put = placement.batch if placement else lambda batch: batch
            results = [
                jax.device_get(self._loss(params, constants, extra, put(batch), jax.random.key(0)))
                for batch in self._heldout_batches()
            ]
        rows = [{"loss": loss, **metrics} for loss, metrics in results]
        return {f"heldout/{k}": float(np.mean([r[k] for r in rows])) for k in rows[0]}

    @functools.cached_property
    def _loss(self) -> Callable:
        """The loss and its metrics alone, compiled."""

        def loss(*args: Any) -> tuple:
            value, (metrics, _) = self.loss(*args)
            return value, metrics

        return jax.jit(loss)

    def _heldout_batches(self) -> Iterator[Batch]:
        """The same ones each time, kept where they are small."""
        if self._kept:
            yield from self._kept
            return
        batches = []
        reads = dataclasses.replace(reading(self.cfg, "heldout"), ahead=0)
        with contextlib.closing(self.batches("heldout", reads, self.own_rows)) as data:
            for _ in range(self.cfg.eval.batches):
                batch = next(data)
                if self.cfg.eval.batches * sum(x.nbytes for x in jax.tree.leaves(batch)) < KEPT:
                    batches.append(batch)
                yield batch
        self._kept = batches

    def notes(self) -> dict[str, dict[str, Any]]:
        classes = len({concept_number(i) for i in _heldout_ids()})
        notes = {"knn": {"chance": 1.0 / classes, "note": f"which of {classes} held-out concepts, 5 neighbours"}}
        own = [f"{len(source)} of {name}" for name, source in self.sources["heldout"].items()
               if isinstance(source, files.ImageFiles)]
        pictures = f"; held-out pictures: {', '.join(own)}" if own else ""
        for t in self.teachers:
            notes[f"heldout/{t.name}/loss"] = {"chance": None, "note": f"masked patches; teacher: {t.about}{pictures}"}
        return notes


def _heldout_ids() -> list[str]:
    return [emoji.load()[i].id for i in emoji.split("heldout")]


def knn_probe(vision: cogvit.CogViTConfig, params: Params, views: int = 4, k: int = 5) -> float:
    """Accuracy of naming the concept of `views` augmented views of each held-out emoji by their neighbours among as
    many other views; mean-pooled trunk features, nothing trained."""
    patcher = Patcher(patch=vision.patch, temporal=vision.temporal_patch)
    ids = _heldout_ids()
    labels = np.array([concept_number(i) for i in ids])
    embed = jax.jit(lambda v: towers.pooled(cogvit.apply(vision, params, v), v.frame))

    def view(seed: int) -> np.ndarray:
        rng = np.random.default_rng([7, seed])
        pictures = [emoji.augmented(i, rng) for i in emoji.split("heldout")]
        rows = [vision_row(*patcher(p), patcher.max_patches) for p in pictures]
        batch = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
        return np.asarray(embed(VisionInput(batch["patches"], batch["yx"], batch["frame"])))

    gallery, asked = (np.concatenate([view(seed) for seed in range(first, first + views)]) for first in (0, views))
    labels = np.tile(labels, views)
    return float((probes.knn(gallery, labels, asked, k) == labels).mean())

