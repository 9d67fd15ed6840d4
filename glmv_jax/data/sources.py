"""A source on disk, from its entry in `data.sources` of a config: its files, and what reads them.

`pairs` and `local` add what they know: kinds of files, and keys of their own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from glmv_jax.config import nearest
from glmv_jax.data.tars import expand
from glmv_jax.typing import UserError

# kind of files -> the package that reads it, of the extra `data`
PACKAGES = {"parquet": "pyarrow", "array_record": "array_record", "tfds": "tensorflow_datasets"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSource:
    """Where records come from.

    path:     a file, a folder, a pattern ("a-*.tar", "a-{000..127}.tar").
    weight:   how often it is read beside the other sources.

    Of a subclass: KIND, the key that says what its files are, a field of that name ("": told from the path); READERS,
    kind -> (module and class of its reader, what its files are called or "" where a folder is read whole); CHOICES, the
    values that other keys may have.
    """

    path: str
    weight: float = 1.0

    KIND: ClassVar[str]
    READERS: ClassVar[Mapping[str, tuple[str, str]]]
    CHOICES: ClassVar[Mapping[str, Sequence[str]]] = {}

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> Self:
        """From a config's entry. UserError: an unknown key, no path, a value that is none of the choices."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in entry:
            if key not in known:
                raise UserError(f"data.sources.{name} has no key {key!r}{nearest(key, known)}")
        if not entry.get("path"):
            raise UserError(f"data.sources.{name}.path is empty; give a file, a folder or a pattern")
        source = cls(**entry)
        if not source.weight > 0:
            raise UserError(f"data.sources.{name}.weight={source.weight} must be above 0; take the source out instead")
        for key, choices in {**cls.CHOICES, cls.KIND: ("", *cls.READERS)}.items():
            if getattr(source, key) not in choices:
                raise UserError(f"data.sources.{name}.{key}={getattr(source, key)!r} is not known; "
                                f"choose {', '.join(filter(None, choices))}")
        kind = source._kind or cls.told(name, source.path)
        needed = PACKAGES.get(kind, "")
        if needed and importlib.util.find_spec(needed) is None:  # or each file would be left out as one that is broken
            raise UserError(f"data.sources.{name}: {kind} is read by {needed}; pip install 'glmv_jax[data]'")
        told: dict[str, Any] = {cls.KIND: kind}
        return dataclasses.replace(source, **told)

    @classmethod
    def told(cls, name: str, path: str) -> str:
        """The kind of files that a path's name, or what lies in the folder, says. UserError: none, or several."""
        raise NotImplementedError

    @classmethod
    def _only(cls, name: str, path: str, found: set[str], none: str) -> str:
        """The one kind that was found; `none`: what is said of a path where none was."""
        if len(found) != 1:
            what = f"holds {' and '.join(sorted(found))}" if found else none
            key = f"data.sources.{name}.{cls.KIND}"
            raise UserError(f"data.sources.{name}: {path} {what}; set {key}: {', '.join(cls.READERS)}")
        return found.pop()

    @property
    def _kind(self) -> str:
        return getattr(self, self.KIND)

    def files(self) -> list[str]:
        """The files of all its records, in order. UserError: there is none."""
        pattern = self.READERS[self._kind][1]
        if pattern:
            return expand(self.path, pattern)
        folder = os.path.expanduser(self.path)
        if not os.path.isdir(folder):
            raise UserError(f"{self.path}: no such folder")
        return [folder]

    def _reader(self) -> type:
        module, _, reader = self.READERS[self._kind][0].partition(":")
        return getattr(importlib.import_module(f"glmv_jax.data.{module}"), reader)


def names_at(path: str) -> list[str]:
    """The names in a folder, or that of a file or pattern."""
    path = os.path.expanduser(path)
    return os.listdir(path) if os.path.isdir(path) else [os.path.basename(path.rstrip("/"))]
