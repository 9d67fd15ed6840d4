"""Image-text pairs on disk as sources of stage 2: one interface (`reader.Reader`) over five formats.

A source is configured by name, in `data.sources`:

    web   = {"path": "/data/web-{0000..9999}.tar", "weight": 3.0}
    wukong = {"path": "/data/wukong", "format": "parquet", "lang": "zh", "text": "caption"}

with the keys of `Source`. The format is told from the path where it can be.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from glmv_jax.data.emoji import LANGUAGES
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.files import EXTENSIONS
from glmv_jax.data.pairs import tfds
from glmv_jax.data.pairs.fields import Fields
from glmv_jax.data.pairs.reader import Reader
from glmv_jax.data.records import Pair
from glmv_jax.data.sources import FileSource, names_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(FileSource):
    """Where pairs come from; `path` and `weight` as any `FileSource`, the weights within each language (`balance`).

    path:     of a TFDS data set, the folder of one version.
    format:   one of READERS; "": told from the path.
    lang:     "en" or "zh": all its texts are; "auto": told record by record, by field or by characters, in one reading
              of all texts (of array_record and TFDS, of whole records) whose result is kept.
    image, text: names of the fields, "" for the usual ones (`fields`).
    alike:    what makes two pairs of a batch no negatives of each other: the same "image" (its bytes), or the same
              "text", for data with few different texts.
    split:    of a TFDS data set.
    """

    format: str = ""
    lang: str = "auto"
    image: str = ""
    text: str = ""
    alike: str = "image"
    split: str = "train"

    KIND = "format"
    READERS = {
        "folder": ("pairs.folder:Folder", ""),
        "tar": ("pairs.webdataset:WebDataset", "*.tar"),
        "parquet": ("pairs.parquet:Parquet", "*.parquet"),
        "array_record": ("pairs.array_record:ArrayRecord", "*.array_record*"),
        "tfds": ("pairs.tfds:TFDS", ""),
    }
    CHOICES = {"lang": ("auto", *LANGUAGES), "alike": ("image", "text")}

    @classmethod
    def told(cls, name: str, path: str) -> str:
        names = names_at(path)
        if tfds.INFO in names:
            return "tfds"
        found = {form for form in ("tar", "parquet", "array_record") if any(f".{form}" in n.lower() for n in names)}
        if not found and _has_pictures(os.path.expanduser(path)):
            return "folder"
        return cls._only(name, path, found, "says no format, and is no folder of pictures")

    def files(self) -> list[str]:
        if self.format == "tfds":
            return tfds.shards(os.path.expanduser(self.path).rstrip("/"), self.split)
        return super().files()

    def open(self, files: Sequence[str], name: str, log: FaultLog | None = None, cache: str | None = None) -> Reader:
        """The pairs in some of its files."""
        more = {"split": self.split} if self.format == "tfds" else {}
        fields = Fields(self.image, self.text, self.lang)
        return self._reader()(files, fields, name=name, log=log, cache=cache, **more)


def alike(pair: Pair, by: str) -> bytes | str:
    """What pairs that are no negatives of each other have in common (`Source.alike`): picture, or first text."""
    return pair.image if by == "image" else next(pair.texts[lang][0] for lang in LANGUAGES if lang in pair.texts)


def _has_pictures(folder: str) -> bool:
    return any(name.rpartition(".")[2].lower() in EXTENSIONS for _, _, names in os.walk(folder, followlinks=True)
               for name in names)
