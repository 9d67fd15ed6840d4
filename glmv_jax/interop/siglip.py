"""SigLIP and SigLIP 2: Hugging Face folders (`siglip`, `siglip2` and their image towers alone) and big_vision's .npz.

Names: transformers `siglip/modeling_siglip.py`, `siglip2/modeling_siglip2.py`; big_vision `models/proj/image_text`.
Checkpoints of fixed size have a convolution for patches, NaFlex ones a matrix over (y, x, channel), which is the order
that our tower reads too.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from glmv_jax.models.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from glmv_jax.models.vit import ACTIVATIONS
from glmv_jax.typing import Params, UserError

_TOWERS = ("siglip", "siglip2")
_ALONE = ("siglip_vision_model", "siglip2_vision_model")


def load(path: str | Path, *, text: bool = True, dtype: str = "float32") -> tuple[SiglipConfig, Params]:
    """A checkpoint folder, or an .npz of big_vision. text=False: the image tower alone.

    Raises: UserError for a folder without config.json or weights, another family, and tensors that do not fit.
    """
    if Path(path).suffix == ".npz":
        return _load_npz(Path(path), text=text, dtype=dtype)
    hf = read_config(path)
    cfg = config(hf, text=text, dtype=dtype)
    tensors = Tensors(path, _rename)
    skipped = [name for name in tensors if name.endswith("position_ids")]
    if cfg.text is None:
        skipped += [name for name in tensors if not name.startswith("vision_model.")]
    if not cfg.vision.head:
        skipped += [name for name in tensors if name.startswith("vision_model.head.")]
    params = to_params(table(cfg, linear_patches=hf["model_type"].startswith("siglip2")), tensors, skipped)
    return cfg, check_shapes(params, abstract_params(cfg))


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
    return SiglipConfig(vision, SiglipTextConfig(
        vocab=t["vocab_size"], length=t["max_position_embeddings"], depth=t["num_hidden_layers"],
        width=t["hidden_size"], heads=t["num_attention_heads"], mlp=t["intermediate_size"],
        out=t.get("projection_size") or t["hidden_size"], activation=_activation(t["hidden_act"]),
        norm_eps=t["layer_norm_eps"], dtype=dtype,
    ))  # fmt: skip


def table(cfg: SiglipConfig, *, linear_patches: bool) -> list[Entry]:
    """Every tensor of the family for a model of this config."""
    v, hf = cfg.vision, "vision_model."
    patches = matrix if linear_patches else convolution((1, 2, 0), (v.patch, v.patch))
    entries = [
        Entry(hf + "embeddings.patch_embedding.weight", ("vision/patch_embed/kernel",), patches),
        Entry(hf + "embeddings.patch_embedding.bias", ("vision/patch_embed/bias",), same),
        Entry(hf + "embeddings.position_embedding.weight", ("vision/position/embedding",), same),
        *_blocks(hf, "vision/", v.depth),
        *norm(hf + "post_layernorm", "vision/norm"),
        *(_head(hf + "head.", "vision/head/") if v.head else ()),
    ]
    if cfg.text is None:
        return entries
    hf = "text_model."
    return entries + [
        Entry(hf + "embeddings.token_embedding.weight", ("text/embed/embedding",), same),
        Entry(hf + "embeddings.position_embedding.weight", ("text/position/embedding",), same),
        *_blocks(hf, "text/", cfg.text.depth),
        *norm(hf + "final_layer_norm", "text/norm"),
        *linear(hf + "head", "text/head"),
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


def _load_npz(path: Path, *, text: bool, dtype: str) -> tuple[SiglipConfig, Params]:
    """Sizes are read from the shapes: an .npz has no config."""
    try:
        with np.load(path) as file:
            tensors = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no .npz of arrays ({str(error).splitlines()[0]}); download it again") from None
    tensors = _unstacked(tensors)
    first = "params/img/embedding/kernel"
    if first not in tensors:
        raise UserError(f"{path}: no {first} in it; give a two-tower checkpoint of big_vision")
    text = text and "params/txt/Embed_0/embedding" in tensors
    cfg = SiglipConfig(_npz_vision(tensors, dtype), _npz_text(tensors, dtype) if text else None)
    ignored = [] if text else [name for name in tensors if not name.startswith("params/img/")]
    return cfg, check_shapes(to_params(npz_table(cfg), tensors, ignored), abstract_params(cfg))


def _unstacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scanned checkpoints hold all layers of a tower in one array: encoderblock/... -> encoderblock_0/..., ..."""
    result: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        if "/encoderblock/" in name:
            result |= {name.replace("/encoderblock/", f"/encoderblock_{i}/"): x[i] for i in range(len(x))}
        else:
            result[name] = x
    return result


def _tower(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, int]:
    block = prefix + "encoderblock_{}/"
    depth = next(i for i in range(10_000) if block.format(i) + "LayerNorm_0/scale" not in tensors)
    width, heads, _ = tensors[block.format(0) + "MultiHeadDotProductAttention_0/query/kernel"].shape
    mlp = tensors[block.format(0) + "MlpBlock_0/Dense_0/kernel"].shape[1]
    return {"depth": depth, "width": width, "heads": heads, "mlp": mlp}


def _npz_vision(tensors: Mapping[str, np.ndarray], dtype: str) -> SiglipVisionConfig:
    kernel = tensors["params/img/embedding/kernel"]
    pixels = int(np.prod(kernel.shape[:-1])) // 3
    positions = tensors["params/img/pos_embedding"]
    return SiglipVisionConfig(
        **_tower(tensors, "params/img/Transformer/"), patch=round(pixels**0.5),
        table=round((positions.size // kernel.shape[-1]) ** 0.5), head="params/img/MAPHead_0/probe" in tensors,
        dtype=dtype,
    )  # fmt: skip


def _npz_text(tensors: Mapping[str, np.ndarray], dtype: str) -> SiglipTextConfig:
    embedding, positions = tensors["params/txt/Embed_0/embedding"], tensors["params/txt/pos_embedding"]
    return SiglipTextConfig(
        vocab=embedding.shape[0], length=positions.size // embedding.shape[1],
        **_tower(tensors, "params/txt/Encoder_0/"), out=tensors["params/txt/head/kernel"].shape[1], dtype=dtype,
    )  # fmt: skip


def npz_table(cfg: SiglipConfig) -> list[Entry]:
    """Every array of a big_vision checkpoint for a model of this config; kernels are [I, O] there too."""
    v = cfg.vision
    rows = lambda width: Transform(lambda t: (t.reshape(-1, width),), lambda a: a[0][None])  # noqa: E731
    entries = [
        Entry("params/img/embedding/kernel", ("vision/patch_embed/kernel",), rows(v.width)),
        Entry("params/img/embedding/bias", ("vision/patch_embed/bias",), same),
        Entry("params/img/pos_embedding", ("vision/position/embedding",), rows(v.width)),
        *_npz_blocks("params/img/Transformer/", "vision/", v.depth, v.width, v.heads),
    ]
    if v.head:
        theirs, ours = "params/img/MAPHead_0/", "vision/head/"
        entries += [Entry(theirs + "probe", (ours + "probe",), _vector)]
        entries += _npz_block(theirs, ours, {"LayerNorm_0": "norm"}, "", v.width, v.heads, None)
    if cfg.text is None:
        return entries
    t = cfg.text
    return entries + [
        Entry("params/txt/Embed_0/embedding", ("text/embed/embedding",), same),
        Entry("params/txt/pos_embedding", ("text/position/embedding",), rows(t.width)),
        *_npz_blocks("params/txt/Encoder_0/", "text/", t.depth, t.width, t.heads),
        Entry("params/txt/head/kernel", ("text/head/kernel",), same),
        Entry("params/txt/head/bias", ("text/head/bias",), same),
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
