"""Checkpoint folders as Hugging Face writes them: config.json beside one safetensors file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from glmv_jax.typing import UserError


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


class Tensors(Mapping[str, np.ndarray]):
    """Name -> tensor; each is read when it is asked for, so that a checkpoint need not fit into memory twice.

    rename: their name -> the name it is known by here (families renamed their layers over time).
    """

    def __init__(self, folder: str | Path, rename: Callable[[str], str] = lambda name: name) -> None:
        self._files = {rename(name): (name, path) for name, path in _where(Path(folder)).items()}
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        theirs, path = self._files[name]
        if path not in self._open:
            self._open[path] = _opened(path)
        try:
            return np.asarray(self._open[path].get_tensor(theirs))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: tensor {theirs} cannot be read ({_line(error)}); download it again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _where(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} cannot be read ({_line(error)}); download it again") from None
        files = sorted(set(listed.values()))
        missing = [name for name in files if not (folder / name).exists()]
        if missing:
            raise UserError(f"{folder}: {len(missing)} of {len(files)} files are missing, the first is {missing[0]}; "
                            "download the rest")
        return {name: folder / file for name, file in listed.items()}
    if single.exists():
        return dict.fromkeys(_opened(single).keys(), single)
    others = [p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))] if folder.is_dir() else []
    hint = f" ({others[0]} is a pickle; save the model again with safe_serialization=True)" if others else ""
    raise UserError(f"{folder}: no model.safetensors here{hint}; give the folder of a Hugging Face checkpoint")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="flax")  # "np" knows no bfloat16
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({_line(error)}); download it again") from None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
