"""Pictures on disk as a source of stage 1: a folder of them, however deep, or tar files of samples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from glmv_jax.data.faults import FaultLog
from glmv_jax.data.naflex import load_image
from glmv_jax.data.tars import Tars
from glmv_jax.typing import UserError

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


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
            self.names = sorted(_pictures(self.path))
            tars = any(Path(self.path).glob("*.tar"))
            if tars and self.names:
                raise UserError(f"{path}: {len(self.names)} pictures and tar files in one folder; put them in two")
            if not tars and not self.names:
                raise UserError(f"{path}: no picture ({', '.join(EXTENSIONS)}) and no .tar in this folder")
        if not self.names:
            self.tars = Tars(path, log)

    def __len__(self) -> int:
        return len(self.names) if self.tars is None else len(self.tars)

    def __getitem__(self, i: int) -> tuple[str, Image.Image]:
        if self.tars is None:
            return self.names[i], load_image(os.path.join(self.path, self.names[i]))
        id_, files = self.tars[i]
        content = picture(id_, files)
        try:
            return id_, load_image(content)
        except UserError as error:  # which knows the bytes alone
            raise UserError(f"sample {id_}: {error}") from None


def picture(id_: str, files: dict[str, bytes]) -> bytes:
    """The picture among the files of a sample; UserError when there is none."""
    for extension in EXTENSIONS:
        if extension in files:
            return files[extension]
    raise UserError(f"sample {id_} has no picture, only {', '.join(sorted(files)) or 'nothing'}")


def random_crop(image: Image.Image, rng: np.random.Generator, side: int, scale: tuple[float, float]) -> Image.Image:
    """A part of the picture as a square of `side` pixels (Inception's random resized crop).

    scale: least and largest share of the area, drawn evenly; the aspect ratio is drawn from 3:4 to 4:3 in logarithm.
    (1, 1): the whole picture, squeezed.
    """
    width, height = image.size
    box = (0, 0, width, height)
    if scale != (1.0, 1.0):
        for _ in range(10):
            area, aspect = width * height * rng.uniform(*scale), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                box = (x, y, x + w, y + h)
                break
        else:  # a very long picture: a square of its short side
            short = min(width, height)
            x, y = int(rng.integers(width - short + 1)), int(rng.integers(height - short + 1))
            box = (x, y, x + short, y + short)
    if box == (0, 0, side, side) == (0, 0, width, height):
        return image
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def _pictures(folder: str) -> list[str]:
    found = []
    for root, _, names in os.walk(folder, followlinks=True):
        inside = os.path.relpath(root, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in names
                  if name.rpartition(".")[2].lower() in EXTENSIONS and not name.startswith(".")]
    return found
