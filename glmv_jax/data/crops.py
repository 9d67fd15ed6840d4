"""Batches of stage 1: masked crops of pictures, and what teachers said of them if that is stored.

The arrays of a batch are in the head of `pipeline`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from PIL import Image

from glmv_jax.data import features, masks
from glmv_jax.data.files import crop_box, cropped
from glmv_jax.data.mixture import Mixture
from glmv_jax.data.naflex import patchify, to_rgb
from glmv_jax.data.pipeline import ALONE, Reading, vision_row
from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.data.stream import Batches, Rows, Stream
from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Stored:
    """A cache of teachers' features as the source of a batch's `features`. names: of the teachers that are read."""

    cache: features.FeatureCache
    names: tuple[str, ...]
    split: str = "train"


def mim_batches(
    sources: Mapping[str, Any], weights: Mapping[str, float], *, batch: int, size: int = 64, patch: int = 8,
    merge: int = 2, mask_ratio: float = 0.35, mask_kind: str = "blockwise",
    crop_scale: tuple[float, float] = (1.0, 1.0), reading: Reading = ALONE, keys: bool = False,
    stored: Stored | None = None,
) -> Batches:
    """Masked crops of size x size pixels. sources: name -> random access of (id, PIL image).

    mask_kind: "blockwise" or "random". crop_scale: shares of an image's area that are cropped, see `files.random_crop`.
    keys: rows also hold key [B, 64] and id [B], see `features.key`. stored: features come from there; when its crops
    are used up they come again in the same order with new masks.
    """
    if mask_kind not in ("blockwise", "random"):
        raise UserError(f"unknown kind of mask {mask_kind!r}; choose blockwise or random")
    mask = _Mask(mask_kind, size // patch, masks.count_for(mask_ratio, size // patch, size // patch))
    low, high = crop_scale
    transform = functools.partial(_mim_row, size=size, scale=(low, high), patch=patch, merge=merge, mask=mask,
                                  keys=keys or stored is not None)
    names = list(sources)
    rows = {name: reading.guarded(reading.endless(source), functools.partial(transform, source=names.index(name)), name,
                                  records=len(source) if len(source) < ENDLESS else None)
            for name, source in sources.items()}
    mixed = Mixture(rows, weights)
    crops: Any = mixed
    if stored is not None:
        stored.cache.check_whole(stored.split, reading.shard)
        crops = _Again(crops, stored.cache.items[stored.split], mask, reading.seed)
    batches: Any = Stream(grain.MapDataset.source(crops).batch(batch, drop_remainder=True), reading.workers)
    if stored is not None:
        batches = features.WithFeatures(batches, stored.cache, stored.names, stored.split, reading.shard)
    return reading.iterator(batches, mixed)


@dataclasses.dataclass(frozen=True)
class _Mask:
    kind: str
    side: int
    count: int

    def __call__(self, rng: np.random.Generator, yx_P2: np.ndarray) -> np.ndarray:
        """[P] bool in the order of the row."""
        return masks.in_row_order(getattr(masks, self.kind)(rng, self.side, self.side, self.count), yx_P2)


@dataclasses.dataclass(frozen=True)
class _Again:
    """The first `count` rows over and over, with their position; masks are drawn anew from the second time on."""

    rows: Mixture
    count: int
    mask: _Mask
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Rows:
        row = self.rows[k % self.count]
        if k >= self.count:
            row = row | {"mask": self.mask(generator(self.seed, "mask", k), row["yx"])}
        return row | {"position": np.int64(k % self.count)}


def _mim_row(record: tuple[str, Image.Image], rng: np.random.Generator, *, size: int, scale: tuple[float, float],
             patch: int, merge: int, mask: _Mask, source: int, keys: bool) -> Rows:
    picture = to_rgb(record[1])
    box = crop_box(picture.size, rng, scale)
    pixels = np.asarray(cropped(picture, box, size))
    patches, yx = patchify(pixels, patch, merge)
    row = vision_row(patches, yx, len(patches)) | {
        "mask": mask(rng, yx), "image": pixels, "source": np.int32(source)}
    if keys:
        row |= {"key": features.key(record[0], source, box, picture.size, pixels),
                "id": np.bytes_(record[0].encode(errors="surrogateescape"))}
    return row
