"""Pictures on disk as a source of stage 1: a folder of them, however deep, or tar files of samples."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from glmv_jax.data.faults import FaultLog
from glmv_jax.data.naflex import load_image
from glmv_jax.data.tars import Tars
from glmv_jax.typing import UserError

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
FEW = 8  # pictures that are held out however small their share


class ImageFiles:
    """Random access to (id, PIL RGB).

    path: a folder of pictures, or what `tars.Tars` takes. A picture that cannot be read raises when it is asked for
    (the pipeline counts, logs and skips it).
    Raises: UserError when there is no picture.
    """

    def __init__(self, path: str | Path, log: FaultLog | None = None) -> None:
        self.path = os.path.expanduser(str(path))
        self.tars: Tars | None = None
        self.names: list[str] = []
        if os.path.isdir(self.path):
            self.names = sorted(pictures(self.path)[0])
            tars = any(Path(self.path).glob("*.tar"))
            if tars and self.names:
                raise UserError(f"{path}: {len(self.names)} pictures and tar files in one folder; put them in two")
            if not tars and not self.names:
                raise UserError(f"{path}: no picture ({', '.join(EXTENSIONS)}) and no .tar in this folder")
        if not self.names:
            self.tars = Tars(path, log)
        self.numbers: Sequence[int] = range(len(self.names) if self.tars is None else len(self.tars))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[str, Image.Image]:
        number = int(self.numbers[i])
        if self.tars is None:
            return self.names[number], load_image(os.path.join(self.path, self.names[number]))
        id_, files = self.tars[number]
        content = picture(id_, files)
        try:
            return id_, load_image(content)
        except UserError as error:  # which knows the bytes alone
            raise UserError(f"sample {id_}: {error}") from None

    def ids(self) -> list[str]:
        """The id of each picture, none of which is read."""
        name = self.names.__getitem__ if self.tars is None else self.tars.id
        return [name(int(number)) for number in self.numbers]

    def split(self, share: float) -> tuple[ImageFiles, ImageFiles]:
        """Two parts, for training and held out: by a hash of the id, so a picture stays where it is as others come.

        share: held out, at least FEW pictures or a quarter. UserError for fewer than 4 pictures.
        """
        hashes = np.array([_hash(id_) for id_ in self.ids()], np.uint64)
        few = min(FEW, len(hashes) // 4)
        if not few:
            raise UserError(f"{self.path}: {len(hashes)} pictures are too few to hold some out; give at least 4, or "
                            "set data.heldout=0 to report on the shipped corpus")
        bound = max(int(share * 2**64), int(np.partition(hashes, few - 1)[few - 1]) + 1)
        held = hashes < np.uint64(min(bound, 2**64 - 1))
        return self._part(~held), self._part(held)

    def _part(self, picked: np.ndarray) -> ImageFiles:
        part = copy.copy(self)
        part.numbers = np.asarray(self.numbers)[picked]
        return part


def _hash(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def picture(id_: str, files: dict[str, bytes]) -> bytes:
    """The picture among the files of a sample; UserError when there is none."""
    for extension in EXTENSIONS:
        if extension in files:
            return files[extension]
    raise UserError(f"sample {id_} has no picture, only {', '.join(sorted(files)) or 'nothing'}")


def crop_box(
    size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A part of a picture of (width, height), as left, top, right, bottom (Inception's random resized crop).

    scale: least and largest share of the area, drawn evenly; the aspect ratio is drawn from 3:4 to 4:3 in logarithm.
    (1, 1): the whole picture.
    """
    width, height = size
    if scale == (1.0, 1.0):
        return 0, 0, width, height
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*scale), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # a very long picture: a square of its short side
        w = h = min(width, height)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return x, y, x + w, y + h


def cropped(image: Image.Image, box: tuple[int, int, int, int], side: int) -> Image.Image:
    """That part of the picture, squeezed into a square of `side` pixels."""
    if box == (0, 0, side, side) == (0, 0, *image.size):
        return image
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def random_crop(image: Image.Image, rng: np.random.Generator, side: int, scale: tuple[float, float]) -> Image.Image:
    """A part of the picture, see `crop_box`, as a square of `side` pixels."""
    return cropped(image, crop_box(image.size, rng, scale), side)


def pictures(folder: str) -> tuple[list[str], list[str]]:
    """Names of the pictures and of all other files in a folder, however deep; hidden ones are left out."""
    found: tuple[list[str], list[str]] = [], []
    for root, _, names in os.walk(folder, followlinks=True):
        inside = os.path.relpath(root, folder)
        for name in names:
            if not name.startswith("."):
                other = name.rpartition(".")[2].lower() not in EXTENSIONS
                found[other].append(os.path.normpath(os.path.join(inside, name)))
    return found
