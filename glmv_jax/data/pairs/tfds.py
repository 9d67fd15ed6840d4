"""Data sets that TFDS has prepared as array_record, through its `data_source`: no TensorFlow, neither to read nor, with
tensorflow-datasets 4.9.10, to prepare (`builder(..., file_format="array_record").download_and_prepare()`).

Each shard is a data source of its own, so that few are open at a time. Pictures stay encoded until their size is known.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from glmv_jax.data.pairs.fields import Record
from glmv_jax.data.pairs.reader import Opened, Reader
from glmv_jax.typing import UserError

INFO = "dataset_info.json"


class TFDS(Reader):
    """Pairs of a prepared data set. files: of its shards, as `shards` gives them. split: which they are of."""

    kind = "tfds"

    def __init__(self, files: Sequence[str], *args: Any, split: str = "train", **options: Any) -> None:
        self._split = split
        self._open = Opened(functools.partial(_source, split), _closed)
        super().__init__(files, *args, **options)

    def _counts(self) -> list[int]:
        folder = os.path.dirname(self.files[0])
        count = dict(zip(shards(folder, self._split), _builder(folder).info.splits[self._split].shard_lengths))
        return [count[path] for path in self.files]

    def _read(self, file: int, row: int, picture: bool) -> Record:
        return self._open[self.files[file]][row]


def shards(folder: str, split: str) -> list[str]:
    """The files of a split. UserError: no such split, or another file format than array_record."""
    info = _builder(folder).info
    if split not in info.splits:
        raise UserError(f"{folder}: no split {split!r}; it has {', '.join(info.splits)}")
    if info.as_proto.file_format != "array_record":
        raise UserError(f"{folder} was prepared as {info.as_proto.file_format or 'tfrecord'}, which has no random "
                        "access; prepare it with file_format='array_record'")
    return [os.path.join(folder, os.path.basename(os.fspath(path))) for path in info.splits[split].filepaths]


@functools.lru_cache(maxsize=8)
def _builder(folder: str) -> Any:
    return _tfds().builder_from_directory(folder)


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError("reading TFDS data sets needs tensorflow-datasets; pip install 'glmv_jax[data]'") from None
    return tensorflow_datasets


def _source(split: str, path: str) -> Any:
    tfds, folder = _tfds(), os.path.dirname(path)
    builder = _builder(folder)
    encoded = {name: tfds.decode.SkipDecoding() for name, feature in builder.info.features.items()
               if isinstance(feature, tfds.features.Image)}
    return builder.as_data_source(f"{split}[{shards(folder, split).index(path)}shard]", decoders=encoded or None)


def _closed(source: Any) -> None:
    with source.data_source:  # whose end closes its readers
        pass
