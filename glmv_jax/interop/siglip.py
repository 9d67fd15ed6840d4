"""SigLIP and SigLIP 2: Hugging Face folders (`siglip`, `siglip2` and their image towers alone), and big_vision's .npz
(`big_vision`).

Names: transformers `siglip/modeling_siglip.py`, `siglip2/modeling_siglip2.py`.
Checkpoints of fixed size have a convolution for patches, NaFlex ones a matrix over (y, x, channel), which is the order
that our tower reads too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmv_jax.interop import big_vision
from glmv_jax.interop.folder import Tensors, read_config
from glmv_jax.interop.table import (
    Entry,
    check_shapes,
    convolution,
    fused,
    linear,
    matrix,
    norm,
    same,
    scalar,
    to_params,
    vector,
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
        tensors, entries, image = big_vision.Npz(Path(path)), big_vision.table(cfg), "params/img/"
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
    if _is_npz(path):
        cfg = big_vision.config(big_vision.Npz(Path(path)), dtype)
    else:
        cfg = config(read_config(path), dtype=dtype)
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
    defaults: dict[str, Any] = dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
    )  # fmt: skip
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
        Entry("logit_scale", ("scale/log_scale",), scalar),
        Entry("logit_bias", ("scale/bias",), scalar),
    ]


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
        Entry(hf + "probe", (ours + "probe",), vector),
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


def _is_npz(path: str | Path) -> bool:
    return Path(path).suffix == ".npz"
