"""The `params` of a checkpoint as Orbax keeps them, an array at a time: training reads what is written here as its own.

Orbax takes a whole tree that is in memory, and gives one back. Here arrays are written in blocks that are read from
elsewhere just before, and read in parts. Orbax itself writes the file of names; beside it an array is a folder in the
zarr format (version 2), called by its path with dots, that tensorstore writes without compression: random bits do not
shrink. Arrays that Orbax wrote lie in one OCDBT store, which is read as well.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from glmv_jax.interop.table import Leaf
from glmv_jax.trees import nest
from glmv_jax.typing import UserError

BLOCK_BYTES = 1 << 26  # of a file at most: what is held while writing, and read at once
_HOLDERS = 3  # arrays that may hold a block: as many as one tensor of theirs is made of (query, key, value)


def write_arrays(folder: Path, leaves: Mapping[str, Leaf], dtype: np.dtype | None = None) -> None:
    """Writes a `params` folder, which must not exist. dtype: what to store, None for as they are.

    Holds one block (`BLOCK_BYTES`) and the tensors of theirs that it is cut from. Raises what a disk raises.
    """
    names = nest({path: np.zeros(1, dtype or leaf.dtype) for path, leaf in leaves.items()})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
        writer.save(folder.absolute(), args=ocp.args.PyTreeSave(names))
    for path, leaf in leaves.items():
        kept = np.dtype(dtype or leaf.dtype)
        blocks = _block_shape(leaf.shape, kept.itemsize)
        place = folder / path.replace("/", ".")
        shutil.rmtree(place)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(place.absolute())},
            "metadata": {
                "shape": leaf.shape, "chunks": blocks, "dtype": _zarr_name(kept), "compressor": None,
                "dimension_separator": ".",
            },
            "store_data_equal_to_fill_value": True,  # so that a file that is missing is noticed
        }  # fmt: skip
        store = ts.open(spec, create=True).result()
        for block in _blocks(leaf.shape, blocks):
            store[block].write(leaf.read(block, kept)).result()


class StoredArrays(Mapping[str, "StoredArray"]):
    """Slash path -> array of a `params` folder, not yet read. UserError for a folder that is none."""

    def __init__(self, folder: Path) -> None:
        self._holders: list[StoredArray] = []
        try:
            about = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))
            keys = [[k["key"] for k in entry["key_metadata"]] for entry in about["tree_metadata"].values()]
            driver = "zarr3" if about["use_zarr3"] else "zarr"
            base = {"driver": "file", "path": f"{folder.absolute()}/"}
            self._arrays: dict[str, StoredArray] = {}
            for key in keys:
                inside = ".".join(key)
                store: dict[str, Any] = {"driver": "file", "path": f"{base['path']}{inside}/"}
                if about["use_ocdbt"]:
                    store = {"driver": "ocdbt", "base": base, "path": f"{inside}/"}
                opened = ts.open({"driver": driver, "kvstore": store, "fill_missing_data_reads": False}, read=True)
                self._arrays["/".join(key)] = StoredArray(opened.result(), self._make_room)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0][:160]
            raise UserError(f"{folder} holds no parameters that can be read ({reason}); make it again") from None

    def __getitem__(self, path: str) -> StoredArray:
        return self._arrays[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def _make_room(self, array: StoredArray, holds: bool) -> None:
        """`array` is about to be read. If it will hold a block, the last few others may keep theirs, else none may."""
        others = [a for a in self._holders if a is not array]
        kept = others[-(_HOLDERS - 1):] if holds else []
        for old in others[: len(others) - len(kept)]:
            old.release()
        self._holders = [*kept, array] if holds else []


class StoredArray:
    """An array on disk: shape, dtype, and `array[place]`, a part of it by the numbers of its leading dimensions.

    It holds the block of files that the last part came from, as the next is likely there too; of what is read whole it
    holds nothing.
    """

    def __init__(self, store: ts.TensorStore, make_room: Callable[[StoredArray, bool], None]) -> None:
        self._store, self._make_room = store, make_room
        self._chunk: Any = store.chunk_layout.read_chunk.shape  # of files these are known
        self.shape, self.dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
        self.release()

    def release(self) -> None:
        """Frees what is held."""
        self._held: np.ndarray = np.empty(0)
        self._starts: tuple[int, ...] | None = None

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        if not place:
            self._make_room(self, False)
            return self._store.read().result()
        starts = tuple(at // n * n for at, n in zip(place, self._chunk))
        if starts != self._starts:
            self.release()
            self._make_room(self, True)
            block = tuple(slice(a, min(a + n, whole)) for a, n, whole in zip(starts, self._chunk, self.shape))
            self._held, self._starts = self._store[block].read().result(), starts
        return self._held[tuple(at - start for at, start in zip(place, starts))]


def _zarr_name(dtype: np.dtype) -> str:
    return "bfloat16" if dtype.name == "bfloat16" else dtype.str


def _block_shape(shape: Sequence[int], itemsize: int) -> list[int]:
    """The largest block of whole trailing dimensions within BLOCK_BYTES, and as much as fits of the one before."""
    blocks = []
    for at, n in enumerate(shape):
        rest = math.prod(shape[at + 1:]) * itemsize
        blocks.append(max(1, min(n, BLOCK_BYTES // max(1, rest))))
    return blocks


def _blocks(shape: Sequence[int], blocks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    starts = (range(0, n, size) for n, size in zip(shape, blocks))
    for at in itertools.product(*starts):
        yield tuple(slice(a, min(a + size, n)) for a, size, n in zip(at, blocks, shape))
