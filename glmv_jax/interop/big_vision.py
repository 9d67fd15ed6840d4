"""Two towers of big_vision as one .npz: sizes by its shapes, and the table of its arrays.

Names: big_vision `models/proj/image_text`.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmv_jax.interop.table import Entry, Transform, same, scalar, vector
from glmv_jax.models.siglip import LastConfig, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from glmv_jax.typing import UserError


class Npz(Mapping[str, np.ndarray]):
    """Name -> array, read when asked for. Scanned checkpoints hold all layers of a tower in one array; here each layer
    has its own name: encoderblock/... -> encoderblock_0/..., ...

    shapes: name -> shape, from the headers alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[str, int | None]] = {}
        try:
            with zipfile.ZipFile(path) as file:
                found = {name.removesuffix(".npy"): _shape(file, name) for name in file.namelist()}
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; check the path") from None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise self._broken(error) from None
        for name, shape in found.items():
            if "/encoderblock/" in name:
                layers = {name.replace("/encoderblock/", f"/encoderblock_{i}/"): i for i in range(shape[0])}
                self._where |= {layer: (name, i) for layer, i in layers.items()}
                self.shapes |= dict.fromkeys(layers, shape[1:])
            else:
                self._where[name], self.shapes[name] = (name, None), shape
        self._last: tuple[str, Any] = ("", None)  # the layers of an array are asked for one after another

    def __getitem__(self, name: str) -> np.ndarray:
        stored, layer = self._where[name]
        if stored != self._last[0]:
            try:
                with np.load(self.path) as file:
                    self._last = (stored, file[stored])
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise self._broken(error) from None
        return self._last[1] if layer is None else self._last[1][layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{self.path} is no .npz of arrays ({str(error).splitlines()[0]}); download it again")


def _shape(file: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with file.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream)[0]


def config(npz: Npz, dtype: str) -> SiglipConfig:
    """Sizes are read from the shapes: an .npz has no config."""
    shapes = npz.shapes
    first = "params/img/embedding/kernel"
    if first not in shapes:
        raise UserError(f"{npz.path}: no {first} in it; give a two-tower checkpoint of big_vision")
    vision = _vision(shapes, dtype)
    if "params/txt/Embed_0/embedding" not in shapes:
        return SiglipConfig(vision)
    text = _text(shapes, dtype)
    return SiglipConfig(vision, text, LastConfig(text.width, shapes["params/txt/head/kernel"][1], dtype))


_Shapes = Mapping[str, tuple[int, ...]]


def _tower(shapes: _Shapes, prefix: str) -> dict[str, Any]:
    block = prefix + "encoderblock_{}/"
    depth = next(i for i in range(10_000) if block.format(i) + "LayerNorm_0/scale" not in shapes)
    width, heads, _ = shapes[block.format(0) + "MultiHeadDotProductAttention_0/query/kernel"]
    mlp = shapes[block.format(0) + "MlpBlock_0/Dense_0/kernel"][1]
    return {"depth": depth, "width": width, "heads": heads, "mlp": mlp}


def _vision(shapes: _Shapes, dtype: str) -> SiglipVisionConfig:
    *pixels, width = shapes["params/img/embedding/kernel"]
    positions = math.prod(shapes["params/img/pos_embedding"]) // width
    return SiglipVisionConfig(
        **_tower(shapes, "params/img/Transformer/"), patch=round((math.prod(pixels) // 3) ** 0.5),
        table=round(positions**0.5), head="params/img/MAPHead_0/probe" in shapes, dtype=dtype,
    )  # fmt: skip


def _text(shapes: _Shapes, dtype: str) -> SiglipTextConfig:
    vocab, width = shapes["params/txt/Embed_0/embedding"]
    length = math.prod(shapes["params/txt/pos_embedding"]) // width
    return SiglipTextConfig(vocab=vocab, length=length, **_tower(shapes, "params/txt/Encoder_0/"), dtype=dtype)


def table(cfg: SiglipConfig) -> list[Entry]:
    """Every array of a big_vision checkpoint for a model of this config; kernels are [I, O] there too."""
    return _image_table(cfg.vision) + _text_table(cfg.text)


def _rows(width: int) -> Transform:
    return Transform(lambda t: (t.reshape(-1, width),), lambda a: a[0][None])


def _image_table(v: SiglipVisionConfig | None) -> list[Entry]:
    if v is None:
        return []
    entries = [
        Entry("params/img/embedding/kernel", ("vision/patch_embed/kernel",), _rows(v.width)),
        Entry("params/img/embedding/bias", ("vision/patch_embed/bias",), same),
        Entry("params/img/pos_embedding", ("vision/position/embedding",), _rows(v.width)),
        *_blocks("params/img/Transformer/", "vision/", v.depth, v.width, v.heads),
    ]
    if v.head:
        theirs, ours = "params/img/MAPHead_0/", "vision/head/"
        entries += [Entry(theirs + "probe", (ours + "probe",), vector)]
        entries += _block(theirs, ours, {"LayerNorm_0": "norm"}, "", v.width, v.heads, None)
    return entries


def _text_table(t: SiglipTextConfig | None) -> list[Entry]:
    if t is None:
        return []
    return [
        Entry("params/txt/Embed_0/embedding", ("text/embed/embedding",), same),
        Entry("params/txt/pos_embedding", ("text/position/embedding",), _rows(t.width)),
        *_blocks("params/txt/Encoder_0/", "text/", t.depth, t.width, t.heads),
        Entry("params/txt/head/kernel", ("text_head/projection/kernel",), same),
        Entry("params/txt/head/bias", ("text_head/projection/bias",), same),
        Entry("params/t", ("scale/log_scale",), scalar),
        Entry("params/b", ("scale/bias",), scalar),
    ]


def _blocks(theirs: str, ours: str, depth: int, width: int, heads: int) -> list[Entry]:
    norms = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2"}
    last = {"scale": f"{ours}norm/scale", "bias": f"{ours}norm/bias"}
    return [
        *_block(theirs + "encoderblock_{i}/", ours + "blocks/", norms, "attention/", width, heads, depth),
        *(Entry(f"{theirs}encoder_norm/{leaf}", (path,), same) for leaf, path in last.items()),
    ]


def _block(
    theirs: str, ours: str, norms: Mapping[str, str], attention: str, width: int, heads: int, layers: int | None
) -> list[Entry]:
    """Norms, attention and MLP of a block, or of the pooling head."""
    square, K = lambda t: (t.reshape(width, width),), width // heads
    read = Transform(square, lambda a: a[0].reshape(width, heads, K))
    write = Transform(square, lambda a: a[0].reshape(heads, K, width))
    flat = Transform(lambda t: (t.reshape(-1),), lambda a: a[0].reshape(heads, K))
    entries = [
        Entry(f"{theirs}{n}/{leaf}", (f"{ours}{o}/{leaf}",), same, layers)
        for n, o in norms.items() for leaf in ("scale", "bias")
    ]  # fmt: skip
    inner = theirs + "MultiHeadDotProductAttention_0/"
    for name, projection in zip("qkv", ("query", "key", "value")):
        entries.append(Entry(f"{inner}{projection}/kernel", (f"{ours}{attention}{name}/kernel",), read, layers))
        entries.append(Entry(f"{inner}{projection}/bias", (f"{ours}{attention}{name}/bias",), flat, layers))
    entries.append(Entry(f"{inner}out/kernel", (f"{ours}{attention}o/kernel",), write, layers))
    entries.append(Entry(f"{inner}out/bias", (f"{ours}{attention}o/bias",), same, layers))
    for n, name in enumerate(("up", "down")):
        for leaf in ("kernel", "bias"):
            entries.append(Entry(f"{theirs}MlpBlock_0/Dense_{n}/{leaf}", (f"{ours}mlp/{name}/{leaf}",), same, layers))
    return entries
