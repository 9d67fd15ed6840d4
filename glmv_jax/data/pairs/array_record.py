"""array_record files of tf.train.Example records (`example`): grain's format, and that of prepared TFDS data sets."""

from __future__ import annotations

from typing import Any

from glmv_jax.data.pairs import example
from glmv_jax.data.pairs.fields import Record
from glmv_jax.data.pairs.reader import Opened, Reader
from glmv_jax.typing import UserError


class ArrayRecord(Reader):
    """Pairs of array_record files. Features may have the prefixes that TFDS gives nested ones ("captions/text")."""

    kind = "array_record"

    def _counts(self) -> list[int]:
        self._open = Opened(_file, _closed)
        return super()._counts()

    def _count(self, file: int) -> int:
        return self._open[self.files[file]].num_records()

    def _read(self, file: int, row: int, picture: bool) -> Record:
        reader = self._open[self.files[file]]
        try:
            content = reader.read([row])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"record {row} cannot be read ({_line(error)})") from None
        features = example.parse(content)
        return features | {k.removesuffix("/text"): v for k, v in features.items() if k.endswith("/text")}


def _file(path: str) -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise UserError("reading array_record files needs array_record; pip install 'glmv_jax[data]'") from None
    try:
        reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0", file_reader_buffer_size=32768)
        if not reader.ok():
            reader.read([0])  # says what is wrong, which opening it does not
        return reader
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"the array_record file cannot be read ({_line(error)})") from None


def _closed(reader: Any) -> None:
    reader.close()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
