"""Image-text pairs on disk as sources of stage 2: one interface (`reader.Reader`) over five formats.

A source is configured by name, in `data.sources`:

    web   = {"path": "/data/web-{0000..9999}.tar", "weight": 3.0}
    wukong = {"path": "/data/wukong", "format": "parquet", "lang": "zh", "text": "caption"}

with the keys of `Source`. The format is told from the path where it can be.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from glmv_jax.config import nearest
from glmv_jax.data.emoji import LANGUAGES
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.files import EXTENSIONS
from glmv_jax.data.pairs import tfds
from glmv_jax.data.pairs.fields import Fields
from glmv_jax.data.pairs.reader import Reader
from glmv_jax.data.records import Pair
from glmv_jax.data.tars import expand
from glmv_jax.typing import UserError

# format -> (module and class of its reader, what its files are called)
FORMATS = {
    "folder": ("folder:Folder", ""),
    "tar": ("webdataset:WebDataset", "*.tar"),
    "parquet": ("parquet:Parquet", "*.parquet"),
    "array_record": ("array_record:ArrayRecord", "*.array_record*"),
    "tfds": ("tfds:TFDS", ""),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where pairs come from.

    path:     a file, a folder, a pattern ("a-*.tar", "a-{000..127}.tar"); a TFDS data set's folder of one version.
    format:   one of FORMATS; "": told from the path.
    weight:   how often it is read beside the others, within each language (`balance`).
    lang:     "en" or "zh": all its texts are; "auto": told record by record, by field or by characters, in one reading
              of all texts (of array_record and TFDS, of whole records) whose result is kept.
    image, text: names of the fields, "" for the usual ones (`fields`).
    alike:    what makes two pairs of a batch no negatives of each other: the same "image" (its bytes), or the same
              "text", for data with few different texts.
    split:    of a TFDS data set.
    """

    path: str
    format: str = ""
    weight: float = 1.0
    lang: str = "auto"
    image: str = ""
    text: str = ""
    alike: str = "image"
    split: str = "train"

    @staticmethod
    def of(name: str, entry: Mapping[str, Any]) -> Source:
        """From a config's entry. UserError: an unknown key, no path, a value that is none of the choices."""
        known = [field.name for field in dataclasses.fields(Source)]
        for key in entry:
            if key not in known:
                raise UserError(f"data.sources.{name} has no key {key!r}{nearest(key, known)}")
        if not entry.get("path"):
            raise UserError(f"data.sources.{name}.path is empty; give a file, a folder or a pattern")
        source = Source(**entry)
        if not source.weight > 0:
            raise UserError(f"data.sources.{name}.weight={source.weight} must be above 0; take the source out instead")
        choices = {"lang": ("auto", *LANGUAGES), "alike": ("image", "text"), "format": ("", *FORMATS)}
        for key, known in choices.items():
            if getattr(source, key) not in known:
                raise UserError(f"data.sources.{name}.{key}={getattr(source, key)!r} is not known; "
                                f"choose {', '.join(filter(None, known))}")
        return dataclasses.replace(source, format=source.format or told(name, source.path))

    def files(self) -> list[str]:
        """The files of all its records, in order. UserError: there is none."""
        path = os.path.expanduser(self.path)
        if self.format == "folder":
            if not os.path.isdir(path):
                raise UserError(f"{self.path}: no such folder")
            return [path]
        if self.format == "tfds":
            return tfds.shards(path.rstrip("/"), self.split)
        return expand(self.path, FORMATS[self.format][1])

    def open(self, files: Sequence[str], name: str, log: FaultLog | None = None, cache: str | None = None) -> Reader:
        """The pairs in some of its files."""
        module, _, reader = FORMATS[self.format][0].partition(":")
        cls = getattr(importlib.import_module(f"glmv_jax.data.pairs.{module}"), reader)
        more = {"split": self.split} if self.format == "tfds" else {}
        return cls(files, Fields(self.image, self.text, self.lang), name=name, log=log, cache=cache, **more)


def alike(pair: Pair, by: str) -> bytes | str:
    """What pairs that are no negatives of each other have in common (`Source.alike`): picture, or first text."""
    return pair.image if by == "image" else next(pair.texts[lang][0] for lang in LANGUAGES if lang in pair.texts)


def told(name: str, path: str) -> str:
    """The format that a path's name, or what lies in the folder, says."""
    text = os.path.expanduser(path)
    names = os.listdir(text) if os.path.isdir(text) else [os.path.basename(text.rstrip("/"))]
    if tfds.INFO in names:
        return "tfds"
    found = {form for form in ("tar", "parquet", "array_record") if any(f".{form}" in n.lower() for n in names)}
    if not found and _has_pictures(text):
        return "folder"
    if len(found) != 1:
        what = f"holds {' and '.join(sorted(found))}" if found else "says no format, and is no folder of pictures"
        raise UserError(f"data.sources.{name}: {path} {what}; set data.sources.{name}.format: {', '.join(FORMATS)}")
    return found.pop()


def _has_pictures(folder: str) -> bool:
    return any(name.rpartition(".")[2].lower() in EXTENSIONS for _, _, names in os.walk(folder, followlinks=True)
               for name in names)
