"""The shipped faces: five Latin and one Chinese for training, two Latin of other families and one Chinese held out."""

from __future__ import annotations

import functools
import json

import numpy as np
from PIL import ImageFont

from glmv_jax.data import corpus


@functools.cache
def files(split: str, lang: str) -> tuple[str, ...]:
    """File names of the faces of a split ("train", "heldout") and language ("en", "zh")."""
    table = json.loads(corpus.path("fonts.json").read_text(encoding="utf-8"))
    names = tuple(row["file"] for row in table if (row["split"], row["lang"]) == (split, lang))
    if not names:
        raise KeyError(f"no face for split={split!r}, lang={lang!r}")
    return names


@functools.lru_cache(maxsize=256)
def load(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A face at `size` pixels. The basic layout engine gives the same pixels with every build of Pillow."""
    return ImageFont.truetype(str(corpus.path(name)), size, layout_engine=ImageFont.Layout.BASIC)


def face_name(split: str, lang: str, rng: np.random.Generator) -> str:
    """File name of a random face of the split that covers the language."""
    names = files(split, lang)
    return names[int(rng.integers(len(names)))]


def face(split: str, lang: str, rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    """A random face of the split that covers the language. Chinese faces also hold ASCII, Latin ones nothing else."""
    return load(face_name(split, lang, rng), size)
