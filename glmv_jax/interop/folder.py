"""Checkpoint folders as Hugging Face writes them: config.json beside one safetensors file, or several with an index.

Reading maps files and copies nothing; writing holds one tensor at a time. The format: 8 bytes with the length of a JSON
header (name -> dtype, shape, place), the header, the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from glmv_jax.interop.table import Saved
from glmv_jax.typing import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 * 10**9  # of a file that is written; what the Hub recommends at most
# The format's names of what NumPy can hold.
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32,
        "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}  # fmt: skip


def read_config(folder: str | Path) -> dict[str, Any]:
    """The contents of config.json. UserError when there is none, or it is no JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json here; give the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_line(error)}); download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return config


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, the format's name of its dtype, its shape, and where in the file it begins."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Tensors(Mapping[str, np.ndarray]):
    """Name -> tensor, a read-only view of its file: only what is used of it is read, and memory is the system's again
    when the view is gone. So a checkpoint need not fit into memory twice, or once.

    folder: config.json need not be there. rename: their name -> the name it is known by here (families renamed their
    layers over time). Raises UserError for files that are missing, cut short or no safetensors.
    """

    def __init__(self, folder: str | Path, rename: Callable[[str], str] = lambda name: name) -> None:
        self.folder = Path(folder)
        self._places = {rename(name): place for name, place in _places(self.folder).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        if place.dtype not in DTYPES:
            raise UserError(f"{place.path}: tensor {name} is {place.dtype}, which cannot be read; take the checkpoint "
                            "in bfloat16")
        try:
            if not math.prod(place.shape):
                return np.zeros(place.shape, DTYPES[place.dtype])
            mapped = np.memmap(place.path, DTYPES[place.dtype], "r", place.offset, place.shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{place.path}: tensor {name} cannot be read ({_line(error)}); download it again") from None
        return mapped.view(np.ndarray)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._places[name].path


def _places(folder: Path) -> dict[str, _Place]:
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        return _sharded(folder, index)
    if single.exists():
        return _header(single)
    others = [p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))] if folder.is_dir() else []
    hint = f" ({others[0]} is a pickle; save the model again with safe_serialization=True)" if others else ""
    raise UserError(f"{folder}: no model.safetensors here{hint}; give the folder of a Hugging Face checkpoint")


def _sharded(folder: Path, index: Path) -> dict[str, _Place]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read ({_line(error)}); download it again") from None
    if missing := [name for name in files if not (folder / name).exists()]:
        raise UserError(f"{folder}: {len(missing)} of {len(files)} files are missing, the first is {missing[0]}; "
                        "download the rest")
    found: dict[str, _Place] = {}
    for file in files:
        found.update(_header(folder / file))
    if absent := sorted(listed.keys() - found.keys()):
        raise UserError(f"{index} lists tensor {absent[0]}, which {listed[absent[0]]} does not hold; download both "
                        "again")
    return found


def _header(path: Path) -> dict[str, _Place]:
    try:
        with safe_open(path, framework="np"):  # checks that header and length agree, and that no bytes overlap
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole safetensors file ({_line(error)}); download it again") from None
    header.pop("__metadata__", None)
    return {
        name: _Place(path, about["dtype"], tuple(about["shape"]), 8 + length + about["data_offsets"][0])
        for name, about in header.items()
    }


def write_tensors(
    folder: Path, tensors: Sequence[Saved], dtype: np.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """One safetensors file, or several of at most `shard_bytes` with their index, each tensor read, written and let go.

    dtype: what to write them as, None for as they are. Raises OSError for a disk that cannot be written.
    """
    size = lambda one: math.prod(one.shape) * np.dtype(dtype or one.dtype).itemsize  # noqa: E731
    shards: list[list[Saved]] = [[]]
    room = shard_bytes
    for one in tensors:
        if shards[-1] and size(one) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(one)
        room -= size(one)
    if len(shards) == 1:
        _write_shard(folder / SINGLE, shards[0], dtype)
        return
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        _write_shard(folder / file, shard, dtype)
    listed = {one.name: file for file, shard in zip(files, shards) for one in shard}
    index = {"metadata": {"total_size": sum(map(size, tensors))}, "weight_map": listed}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, tensors: Sequence[Saved], dtype: np.dtype | None) -> None:
    names = {known: name for name, known in DTYPES.items()}
    # Widest first, so that every tensor begins at a multiple of its own width.
    ordered = sorted(tensors, key=lambda one: -np.dtype(dtype or one.dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in ordered:
        kept = np.dtype(dtype or one.dtype)
        begin, end = end, end + math.prod(one.shape) * kept.itemsize
        header[one.name] = {"dtype": names[kept], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in ordered:
            tensor = one.read().astype(dtype or one.dtype, order="C", copy=False)
            file.write(tensor.reshape(-1).view(np.uint8).data)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
