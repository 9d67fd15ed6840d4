"""Public checkpoints by their model_type: which config, which table of tensors, which tensors repeat others.

A family is a module with `config(hf, *, mtp_layers, dtype)`, `table(cfg)`, `duplicates(cfg)`; one more is a line here.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from glmv_jax.interop import mtp
from glmv_jax.interop.folder import Tensors, read_config
from glmv_jax.interop.table import Entry, Leaf, Saved, check_shapes, leaves, saved
from glmv_jax.models.api import abstract_params
from glmv_jax.trees import flatten, nest
from glmv_jax.typing import Params, UserError

FAMILIES = {
    "glm_ocr": "glmv_jax.interop.glm_ocr",
    "glm4v": "glmv_jax.interop.glm4v",
    "glm46v": "glmv_jax.interop.glm46v",
    "glm4v_moe": "glmv_jax.interop.glm4v_moe",
    "glm_moe_dsa": "glmv_jax.interop.glm_moe_dsa",
    "glm5_next": "glmv_jax.interop.glm5_next",
}
# What parameters may be stored as, and models compute in.
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_COMPARED = 1 << 26  # bytes of two tensors that are compared at a time


def family(model_type: Any) -> ModuleType:
    """The module of a family; UserError names those that there are."""
    if model_type not in FAMILIES:
        raise UserError(f"config.json: model_type {model_type!r} is not known; choose a checkpoint of "
                        f"{', '.join(sorted(FAMILIES))}")
    return importlib.import_module(FAMILIES[model_type])


def np_dtype(name: str) -> np.dtype:
    """The dtype of a name; UserError names the known ones."""
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def model_config(hf: Mapping[str, Any], *, mtp_layers: int, dtype: str) -> Any:
    """The model config of a config.json. UserError for a key that it lacks, and as the family's `config`."""
    module = family(hf.get("model_type"))
    try:
        return module.config(hf, mtp_layers=mtp_layers, dtype=dtype)
    except KeyError as error:
        raise UserError(f"config.json has no {error}; is it of another version of {hf['model_type']}?") from None
    except ValueError as error:
        raise UserError(f"config.json contradicts itself: {error}") from None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint that is open and has been checked against its config; no tensor has been read.

    hf: the contents of config.json.   cfg: the model's config.   arrays: our arrays by slash path.
    repeated: names of tensors that repeat others, and so are in no array.
    """

    folder: Path
    hf: dict[str, Any]
    cfg: Any
    arrays: dict[str, Leaf]
    repeated: tuple[str, ...]

    @property
    def mtp_layers(self) -> int:
        return mtp.count(self.cfg.mtp)


def open_checkpoint(folder: str | Path, dtype: str | None = None) -> Checkpoint:
    """A checkpoint folder in Hugging Face layout.

    dtype: what the model computes in; default: what most of its numbers are stored as.
    Raises UserError, one line with file, tensor and remedy: no folder, another model_type, a file that is missing or
    cut short, a tensor that is missing, unknown, quantised, or of another shape than the config says.
    """
    folder = Path(folder)
    hf = read_config(folder)
    family(hf.get("model_type"))
    tensors = Tensors(folder)
    mtp_layers = mtp.layers_in(hf, tensors)
    cfg = model_config(hf, mtp_layers=mtp_layers, dtype="float32")
    repeats = {name: of for name, of in origins(hf, cfg).items() if name in tensors}
    arrays = leaves(family(hf["model_type"]).table(cfg), tensors, repeats)
    check_shapes(arrays, abstract_params(cfg))
    for name, of in repeats.items():
        if of in tensors and not _equal(tensors[name], tensors[of]):
            raise UserError(f"{tensors.file_of(name)}: tensor {name} differs from {of}, but here one serves as both; "
                            "take a checkpoint that shares them")
    cfg = model_config(hf, mtp_layers=mtp_layers, dtype=dtype or stored_dtype(arrays))
    return Checkpoint(folder, hf, cfg, arrays, tuple(repeats))


def origins(hf: Mapping[str, Any], cfg: Any) -> dict[str, str]:
    """The family's tensors that repeat others, each with the one that it repeats: the table of words, or the head."""
    module = family(hf["model_type"])
    of = {entry.ours[0]: entry.theirs for entry in module.table(cfg)}
    words = of["decoder/embed/embedding"]
    head = of.get("decoder/head", words)
    return {name: words if name.endswith("embed_tokens.weight") else head for name in module.duplicates(cfg)}


def stored_dtype(arrays: Mapping[str, Any]) -> str:
    """bfloat16 where most numbers are stored in 16 bits, else float32."""
    size = lambda narrow: sum(  # noqa: E731
        int(np.prod(a.shape)) for a in arrays.values() if (np.dtype(a.dtype).itemsize == 2) == narrow
    )
    return "bfloat16" if size(True) > size(False) else "float32"


def load(checkpoint: Checkpoint, shardings: Params | None = None, dtype: str | None = None) -> Params:
    """The parameters of a checkpoint, each straight to where it lives: no device holds more than its part, and the
    host holds one part of one array at a time.

    shardings: a tree of jax.sharding.Sharding like the parameters; default: the first device.
    dtype: of the parameters; default: as stored.
    """
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = dict.fromkeys(checkpoint.arrays, first) if shardings is None else flatten(shardings)
    as_dtype = None if dtype is None else np_dtype(dtype)
    placed = {}
    for path, leaf in checkpoint.arrays.items():
        kept = as_dtype or leaf.dtype
        read = lambda index, leaf=leaf, kept=kept: leaf.read(index, kept)  # noqa: E731
        placed[path] = jax.make_array_from_callback(leaf.shape, places[path], read, dtype=kept)
        placed[path].block_until_ready()  # so that the host's copy is gone before the next is made
    return nest(placed)


def tensors_of(hf: Mapping[str, Any], cfg: Any, arrays: Mapping[str, Any], repeated: Sequence[str] = ()) -> list[Saved]:
    """The family's tensors for arrays of ours (as `table.saved` takes them), those that repeat others included.

    repeated: which of the family's duplicates to write as well. UserError as `table.saved`.
    """
    table: list[Entry] = family(hf["model_type"]).table(cfg)
    found = saved(table, arrays)
    by_name = {one.name: one for one in found}
    again = origins(hf, cfg)
    return found + [dataclasses.replace(by_name[again[name]], name=name) for name in repeated]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    rows = max(1, _COMPARED // max(1, a[0].nbytes))
    return all(np.array_equal(a[i:i + rows], b[i:i + rows]) for i in range(0, len(a), rows))
