"""SigLIP and SigLIP 2: Hugging Face folders (`siglip`, `siglip2` and their image towers alone) and big_vision's .npz.

Names: transformers `siglip/modeling_siglip.py`, `siglip2/modeling_siglip2.py`; big_vision `models/proj/image_text`.
Checkpoints of fixed size have a convolution for patches, NaFlex ones a matrix over (y, x, channel), which is the order
that our tower reads too.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmv_jax.interop.folder import Tensors, read_config
from glmv_jax.interop.table import (
    Entry,
    Transform,
    check_shapes,
    convolution,
    fused,
    linear,
    matrix,
    norm,
    same,
    to_params,
)
from glmv_jax.models.api import abstract_params
from glmv_jax.models.siglip import LastConfig, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from glmv_jax.models.vit import ACTIVATIONS
from glmv_jax.typing import Params, UserError

_TOWERS = ("siglip", "siglip2")
_ALONE = ("siglip_vision_model", "siglip2_vision_model")


def load(
    path: str | Path, *, vision: bool = True, text: bool = True, dtype: str = "float32"
) -> tuple[SiglipConfig, Params]:
    """A checkpoint folder, or an .npz of big_vision. text=False: the image tower alone; vision=False: the text side.

    Raises: UserError for a folder without config.json or weights, another family, and tensors that do not fit.
    """
    cfg = sizes(path, vision=vision, text=text, dtype=dtype)
    if _is_npz(path):
        tensors, entries, image = _Npz(Path(path)), npz_table(cfg), "params/img/"
    else:
        linear_patches = read_config(path)["model_type"].startswith("siglip2")
        tensors, entries, image = Tensors(path, _rename), table(cfg, linear_patches=linear_patches), "vision_model."
    left_out = [name for name in tensors if name.endswith("position_ids")]
    if cfg.text is None:
        left_out += [name for name in tensors if not name.startswith(image)]
    if cfg.vision is None:
        left_out += [name for name in tensors if name.startswith(image)]
    elif not cfg.vision.head:
        left_out += [name for name in tensors if name.startswith("vision_model.head.")]
    return cfg, check_shapes(to_params(entries, tensors, left_out), abstract_params(cfg))


def sizes(path: str | Path, *, vision: bool = True, text: bool = True, dtype: str = "float32") -> SiglipConfig:
    """The config of what `load` would give; weights are not read."""
    cfg = _npz_config(_Npz(Path(path)), dtype) if _is_npz(path) else config(read_config(path), dtype=dtype)
    if not text:
        cfg = dataclasses.replace(cfg, text=None, text_head=None)
    if not vision:
        if cfg.text is None:
            raise UserError(f"{path} has no text tower; give a checkpoint of both towers")
        cfg = dataclasses.replace(cfg, vision=None)
    return cfg


def config(hf: Mapping[str, Any], *, text: bool = True, dtype: str = "float32") -> SiglipConfig:
    """SiglipConfig from the contents of config.json; UserError for another model_type or activation."""
    kind = hf.get("model_type")
    if kind not in _TOWERS + _ALONE:
        raise UserError(f"config.json: model_type {kind!r} is not one of {', '.join(_TOWERS + _ALONE)}")
    # Saved configs leave out what equals the default of their class.
    defaults = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)  # fmt: skip
    v = defaults | {"patch_size": 16, "num_channels": 3, "image_size": 224, "num_patches": 256, "vision_use_head": True}
    v |= dict(hf if kind in _ALONE else hf.get("vision_config") or {})
    if kind.startswith("siglip2"):
        table_side = round(v["num_patches"] ** 0.5)
    else:
        table_side = v["image_size"] // v["patch_size"]
    vision = SiglipVisionConfig(
        depth=v["num_hidden_layers"], width=v["hidden_size"], heads=v["num_attention_heads"],
        mlp=v["intermediate_size"], patch=v["patch_size"], table=table_side, channels=v["num_channels"],
        activation=_activation(v["hidden_act"]), norm_eps=v["layer_norm_eps"], head=v["vision_use_head"], dtype=dtype,
    )  # fmt: skip
    if kind in _ALONE or not text:
        return SiglipConfig(vision)
    t = defaults | {"vocab_size": 32_000, "max_position_embeddings": 64} | dict(hf.get("text_config") or {})
    tower = SiglipTextConfig(
        vocab=t["vocab_size"], length=t["max_position_embeddings"], depth=t["num_hidden_layers"],
        width=t["hidden_size"], heads=t["num_attention_heads"], mlp=t["intermediate_size"],
        activation=_activation(t["hidden_act"]), norm_eps=t["layer_norm_eps"], dtype=dtype,
    )  # fmt: skip
    return SiglipConfig(vision, tower, LastConfig(tower.width, t.get("projection_size") or tower.width, dtype))


def table(cfg: SiglipConfig, *, linear_patches: bool) -> list[Entry]:
    """Every tensor of the family for a model of this config."""
    return _image_table(cfg.vision, linear_patches) + _text_table(cfg.text)


def _image_table(v: SiglipVisionConfig | None, linear_patches: bool) -> list[Entry]:
    if v is None:
        return []
    hf, patches = "vision_model.", matrix if linear_patches else convolution((1, 2, 0), (v.patch, v.patch))
    return [
        Entry(hf + "embeddings.patch_embedding.weight", ("vision/patch_embed/kernel",), patches),
        Entry(hf + "embeddings.patch_embedding.bias", ("vision/patch_embed/bias",), same),
        Entry(hf + "embeddings.position_embedding.weight", ("vision/position/embedding",), same),
        *_blocks(hf, "vision/", v.depth),
        *norm(hf + "post_layernorm", "vision/norm"),
        *(_head(hf + "head.", "vision/head/") if v.head else ()),
    ]


def _text_table(t: SiglipTextConfig | None) -> list[Entry]:
    if t is None:
        return []
    hf = "text_model."
    return [
        Entry(hf + "embeddings.token_embedding.weight", ("text/embed/embedding",), same),
        Entry(hf + "embeddings.position_embedding.weight", ("text/position/embedding",), same),
        *_blocks(hf, "text/", t.depth),
        *norm(hf + "final_layer_norm", "text/norm"),
        *linear(hf + "head", "text_head/projection"),
        Entry("logit_scale", ("scale/log_scale",), _scalar),
        Entry("logit_bias", ("scale/bias",), _scalar),
    ]


_scalar = Transform(lambda t: (np.asarray(t).reshape(()),), lambda a: np.asarray(a[0]).reshape(1))
_vector = Transform(lambda t: (np.asarray(t).reshape(-1),), lambda a: np.asarray(a[0])[None, None])


def _blocks(hf: str, ours: str, layers: int) -> list[Entry]:
    theirs, ours = hf + "encoder.layers.{i}.", ours + "blocks/"
    entries = [e for n in (1, 2) for e in norm(f"{theirs}layer_norm{n}", f"{ours}norm{n}", layers)]
    for name, projection in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj")):
        entries += linear(f"{theirs}self_attn.{projection}", f"{ours}attention/{name}", layers)
    return entries + [
        *linear(theirs + "mlp.fc1", ours + "mlp/up", layers), *linear(theirs + "mlp.fc2", ours + "mlp/down", layers)]


def _head(hf: str, ours: str) -> list[Entry]:
    qkv = lambda leaf: tuple(f"{ours}{p}/{leaf}" for p in "qkv")  # noqa: E731
    return [
        Entry(hf + "probe", (ours + "probe",), _vector),
        Entry(hf + "attention.in_proj_weight", qkv("kernel"), fused(3)),
        Entry(hf + "attention.in_proj_bias", qkv("bias"), fused(3, same)),
        *linear(hf + "attention.out_proj", ours + "o"),
        *norm(hf + "layernorm", ours + "norm"),
        *linear(hf + "mlp.fc1", ours + "mlp/up"),
        *linear(hf + "mlp.fc2", ours + "mlp/down"),
    ]


def _rename(name: str) -> str:
    """An image tower saved by itself has no prefix."""
    known = ("vision_model.", "text_model.", "logit_")
    return name if name.startswith(known) else f"vision_model.{name}"


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return name


# --- big_vision -------------------------------------------------------------------------------------------------------


def _is_npz(path: str | Path) -> bool:
    return Path(path).suffix == ".npz"


class _Npz(Mapping[str, np.ndarray]):
    """Name -> array, read when asked for. Scanned checkpoints hold all layers of a tower in one array; here each layer
    has its own name: encoderblock/... -> encoderblock_0/..., ...

    shapes: name -> shape, from the headers alone.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.shapes, self._where = path, {}, {}
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


def _npz_config(npz: _Npz, dtype: str) -> SiglipConfig:
    """Sizes are read from the shapes: an .npz has no config."""
    shapes = npz.shapes
    first = "params/img/embedding/kernel"
    if first not in shapes:
        raise UserError(f"{npz.path}: no {first} in it; give a two-tower checkpoint of big_vision")
    vision = _npz_vision(shapes, dtype)
    if "params/txt/Embed_0/embedding" not in shapes:
        return SiglipConfig(vision)
    text = _npz_text(shapes, dtype)
    return SiglipConfig(vision, text, LastConfig(text.width, shapes["params/txt/head/kernel"][1], dtype))


_Shapes = Mapping[str, tuple[int, ...]]


def _tower(shapes: _Shapes, prefix: str) -> dict[str, int]:
    block = prefix + "encoderblock_{}/"
    depth = next(i for i in range(10_000) if block.format(i) + "LayerNorm_0/scale" not in shapes)
    width, heads, _ = shapes[block.format(0) + "MultiHeadDotProductAttention_0/query/kernel"]
    mlp = shapes[block.format(0) + "MlpBlock_0/Dense_0/kernel"][1]
    return {"depth": depth, "width": width, "heads": heads, "mlp": mlp}


def _npz_vision(shapes: _Shapes, dtype: str) -> SiglipVisionConfig:
    *pixels, width = shapes["params/img/embedding/kernel"]
    positions = math.prod(shapes["params/img/pos_embedding"]) // width
    return SiglipVisionConfig(
        **_tower(shapes, "params/img/Transformer/"), patch=round((math.prod(pixels) // 3) ** 0.5),
        table=round(positions**0.5), head="params/img/MAPHead_0/probe" in shapes, dtype=dtype,
    )  # fmt: skip


def _npz_text(shapes: _Shapes, dtype: str) -> SiglipTextConfig:
    vocab, width = shapes["params/txt/Embed_0/embedding"]
    length = math.prod(shapes["params/txt/pos_embedding"]) // width
    return SiglipTextConfig(vocab=vocab, length=length, **_tower(shapes, "params/txt/Encoder_0/"), dtype=dtype)


def npz_table(cfg: SiglipConfig) -> list[Entry]:
    """Every array of a big_vision checkpoint for a model of this config; kernels are [I, O] there too."""
    return _npz_image_table(cfg.vision) + _npz_text_table(cfg.text)


def _rows(width: int) -> Transform:
    return Transform(lambda t: (t.reshape(-1, width),), lambda a: a[0][None])


def _npz_image_table(v: SiglipVisionConfig | None) -> list[Entry]:
    if v is None:
        return []
    entries = [
        Entry("params/img/embedding/kernel", ("vision/patch_embed/kernel",), _rows(v.width)),
        Entry("params/img/embedding/bias", ("vision/patch_embed/bias",), same),
        Entry("params/img/pos_embedding", ("vision/position/embedding",), _rows(v.width)),
        *_npz_blocks("params/img/Transformer/", "vision/", v.depth, v.width, v.heads),
    ]
    if v.head:
        theirs, ours = "params/img/MAPHead_0/", "vision/head/"
        entries += [Entry(theirs + "probe", (ours + "probe",), _vector)]
        entries += _npz_block(theirs, ours, {"LayerNorm_0": "norm"}, "", v.width, v.heads, None)
    return entries


def _npz_text_table(t: SiglipTextConfig | None) -> list[Entry]:
    if t is None:
        return []
    return [
        Entry("params/txt/Embed_0/embedding", ("text/embed/embedding",), same),
        Entry("params/txt/pos_embedding", ("text/position/embedding",), _rows(t.width)),
        *_npz_blocks("params/txt/Encoder_0/", "text/", t.depth, t.width, t.heads),
        Entry("params/txt/head/kernel", ("text_head/projection/kernel",), same),
        Entry("params/txt/head/bias", ("text_head/projection/bias",), same),
        Entry("params/t", ("scale/log_scale",), _scalar),
        Entry("params/b", ("scale/bias",), _scalar),
    ]


def _npz_blocks(theirs: str, ours: str, depth: int, width: int, heads: int) -> list[Entry]:
    norms = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2"}
    last = {"scale": f"{ours}norm/scale", "bias": f"{ours}norm/bias"}
    return [
        *_npz_block(theirs + "encoderblock_{i}/", ours + "blocks/", norms, "attention/", width, heads, depth),
        *(Entry(f"{theirs}encoder_norm/{leaf}", (path,), same) for leaf, path in last.items()),
    ]


def _npz_block(theirs, ours, norms, attention, width: int, heads: int, layers: int | None) -> list[Entry]:
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
