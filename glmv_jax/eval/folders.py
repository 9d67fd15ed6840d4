"""Evaluation data on disk, in the layout that CLIP benchmark and DataComp share (their `wds_...` data sets).

    <data set>/test/nshards.txt                        5
    <data set>/test/{0..4}.tar                         samples: jpg, jpeg, png or webp, and
                                                         cls  the number of the class, or
                                                         npy  one 0 or 1 for each class (multilabel), or
                                                         txt  a caption a line (retrieval)
                                                       beside cls, npy holds facts of the sample (region, year ...)
    <data set>/train/...                               the same, for probes that are fitted
    <data set>/classnames.txt                          one a line
    <data set>/zeroshot_classification_templates.txt   one a line, {c} for the name
    <data set>/dataset_type.txt                        retrieval or multilabel; no file: classification
                                                       (and winogavil, of `eval.winogavil`)
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data.faults import BUGS, TRIES, FaultLog
from glmv_jax.data.naflex import load_image
from glmv_jax.data.tars import Tars
from glmv_jax.eval import prompts, winogavil
from glmv_jax.typing import UserError

KINDS = ("classification", "multilabel", "retrieval", "winogavil")
IMAGES = ("webp", "png", "jpg", "jpeg")
_LABELS = ("cls", "npy", "txt", "json")


@dataclasses.dataclass(frozen=True)
class Split:
    """The samples of one split, of which all labels could be read; pictures are read when they are asked for.

    pictures: random access to PIL images; reading a broken one raises.   ids: of their samples.
    labels: classification int [N]; multilabel bool [N, C]; retrieval a list of N lists of captions; winogavil a list
      of instances, the pictures of which follow one another.
    facts: int [N, F] of a classification that has them, else None.
    faults: samples that were left out for their labels.
    """

    pictures: Sequence[Image.Image]
    ids: list[str]
    labels: Any
    facts: np.ndarray | None
    faults: int


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A folder in the layout above. Raises UserError for one that is not, or for a kind that is not known."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        file = self.path / "dataset_type.txt"
        kind = file.read_text(encoding="utf-8").strip().lower() if file.exists() else "classification"
        if kind not in KINDS:
            raise UserError(f"{file} says {kind!r}; known are {', '.join(KINDS)}")
        return kind

    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        file = self.path / "classnames.txt"
        if not file.exists():
            raise UserError(f"{self.path} has no classnames.txt; add it, or give --classnames FILE")
        return prompts.class_names(file)

    def templates(self) -> tuple[str, ...] | None:
        """Its own templates, or None."""
        file = self.path / "zeroshot_classification_templates.txt"
        return prompts.templates(str(file)) if file.exists() else None

    def has(self, split: str) -> bool:
        """Whether it has such a split."""
        return any((self.path / split).glob("*.tar"))

    def split(self, split: str = "test", log: FaultLog | None = None, limit: int = 0) -> Split:
        """The split, or `limit` samples spread evenly over it, as they often lie by class. UserError when it is not
        there or not whole."""
        log = log or FaultLog()
        tars = Tars(_shards(self.path / split), log)
        kind, count = self.kind, min(len(tars), limit or len(tars))
        taken = [n * len(tars) // count for n in range(count)]
        pictures: list[tuple[str, int, Sequence[str]]] = []
        found: list[Any] = []
        faults = 0
        for i in taken:
            id_, files = tars.id(i), tars.read(i, _LABELS)
            try:
                if kind == "winogavil":
                    instance = winogavil.instance(files["json"], tars.extensions(i), IMAGES)
                    pictures += [(id_, i, (extension,)) for extension in instance.pictures]
                    found.append(instance)
                else:
                    found.append(_READ[kind](files))
                    pictures.append((id_, i, IMAGES))
            except BUGS:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a broken label raises, and it is logged
                log.add(self.name, id_, f"{type(error).__name__}: {error}", i)
                faults += 1
            if not found and faults == TRIES:  # data of another kind, most likely; no need to log them all
                break
        if not found:
            raise UserError(f"{self.path / split}: no sample has a label that can be read as {kind}")
        facts, labels = None, found
        if kind == "classification":
            facts = _stacked(f"{self.path / split}: facts (npy)", [fact for _, fact in found])
            labels = np.array([label for label, _ in found], np.int64)
        elif kind == "multilabel":
            labels = _stacked(f"{self.path / split}: labels (npy)", found)
        where = [(i, extensions) for _, i, extensions in pictures]
        return Split(_Pictures(tars, where), [id_ for id_, _, _ in pictures], labels, facts, faults)


class _Pictures(Sequence):
    """Pictures of samples (their number, and which extensions), each read from disk when it is asked for."""

    def __init__(self, tars: Tars, chosen: Sequence[tuple[int, Sequence[str]]]) -> None:
        self.tars, self.chosen = tars, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: Any) -> Any:
        """The picture of a number; slices are not had."""
        files = self.tars.read(*self.chosen[i])
        if not files:
            raise UserError(f"the sample has no picture ({', '.join(IMAGES)})")
        return load_image(next(iter(files.values())))


def _shards(folder: Path) -> list[Path]:
    """The tars of a split; all that nshards.txt counts must be there."""
    counted = folder / "nshards.txt"
    if counted.exists():
        text = counted.read_text(encoding="utf-8").strip()
        if not text.isdigit() or not int(text):
            raise UserError(f"{counted} says {text!r}, not how many tar files there are")
        files = [folder / f"{n}.tar" for n in range(int(text))]
    else:
        files = sorted(folder.glob("*.tar"))
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{folder}: {len(missing)} of {len(files)} tar files are missing, the first is {missing[0]}")
    if not files:
        raise UserError(f"{folder} has no tar files")
    return files


def _class_and_facts(files: dict[str, bytes]) -> tuple[int, np.ndarray | None]:
    return int(files["cls"]), _array(files["npy"]) if "npy" in files else None


def _many_classes(files: dict[str, bytes]) -> np.ndarray:
    return _array(files["npy"]) > 0


def _captions(files: dict[str, bytes]) -> list[str]:
    captions = [line.strip() for line in files["txt"].decode("utf-8").splitlines() if line.strip()]
    if not captions:
        raise ValueError("no caption")
    return captions


def _array(data: bytes) -> np.ndarray:
    return np.atleast_1d(np.load(io.BytesIO(data), allow_pickle=False))


# Of a sample's files, what it is to be told by; winogavil has its own.
_READ: dict[str, Callable[[dict[str, bytes]], Any]] = {
    "classification": _class_and_facts, "multilabel": _many_classes, "retrieval": _captions,
}  # fmt: skip


def _stacked(what: str, arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    shapes = {None if array is None else array.shape for array in arrays}
    if len(shapes) > 1:
        raise UserError(f"{what} have different shapes: {', '.join(sorted(map(str, shapes)))}")
    return None if shapes == {None} else np.stack([array for array in arrays if array is not None])


def find(root: Path, names: Sequence[str]) -> Path | None:
    """The first folder of `root` that is one of these data sets, under the names that the public tools give them."""
    for name in names:
        flat = name.replace("/", "-")
        for folder in (name, flat, f"wds_{flat}_test", f"wds_{flat}"):
            if is_data_set(root / folder):
                return root / folder
    return None


def is_data_set(path: Path) -> bool:
    return (path / "test").is_dir() and any((path / "test").glob("*.tar"))


def everything(root: Path) -> list[Path]:
    """All data sets one or two folders deep (as in vtab/cars), by name."""
    return sorted({path for pattern in ("*", "*/*") for path in root.glob(pattern) if is_data_set(path)})
