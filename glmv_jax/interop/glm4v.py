"""GLM-4.1V (transformers `glm4v`): its config and its table of tensors.

The decoder is GLM-OCR's with biases on q, k, v. The tower is models/glm4v_vit.py: its MLP is as wide as what the merger
gives out, while the merger's own MLP has the tower's `intermediate_size`. A video is one frame id for every two of its
frames: `get_video_features` gives each temporal patch to the tower as an image of its own, and its time stands as text
behind it. Names: transformers `glm4v/modeling_glm4v.py`. No released model of the family has an MTP layer; one that is
trained here is written and read under GLM-OCR's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmv_jax.interop import glm_ocr, mtp
from glmv_jax.interop.glm_ocr import duplicates
from glmv_jax.interop.table import Entry, fused, matrix, same
from glmv_jax.models.cogvit import MergerConfig
from glmv_jax.models.decoder import DecoderConfig
from glmv_jax.models.glm4v_vit import Glm4vViTConfig
from glmv_jax.models.vlm import VLMConfig
from glmv_jax.typing import UserError

__all__ = ["config", "duplicates", "parts", "table", "tied", "vision", "vision_table"]


def config(
    hf: Mapping[str, Any], *, model_type: str = "glm4v", mtp_layers: int = 0, dtype: str = "float32"
) -> VLMConfig:
    """VLMConfig from the contents of config.json. UserError for another model_type or an unsupported rotary type."""
    v, t = parts(hf, model_type)
    decoder = DecoderConfig(**glm_ocr.text(t), mlp=t["intermediate_size"], qkv_bias=True, tied=tied(hf), dtype=dtype)
    return VLMConfig(*vision(v, dtype), decoder, mtp.config(decoder, mtp_layers))


def table(cfg: VLMConfig) -> list[Entry]:
    """Every tensor of the family for a model of this config."""
    encoder: Any = cfg.vision  # a Glm4vViTConfig
    return [*vision_table(encoder), *glm_ocr.merger(), *glm_ocr.decoder(cfg)]


def parts(hf: Mapping[str, Any], model_type: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(vision_config, text_config); UserError when it is of another family, or when one of them is not there."""
    if hf.get("model_type") != model_type:
        raise UserError(f"config.json: model_type {hf.get('model_type')!r} is not {model_type}")
    for name in ("vision_config", "text_config"):
        if not hf.get(name):
            raise UserError(f"config.json: no {name} in it; take the config.json of a newer revision")
    return hf["vision_config"], hf["text_config"]


def tied(hf: Mapping[str, Any]) -> bool:
    """Whether the head is the table: said at the top, before transformers 5 in the text model's part."""
    return bool(hf.get("tie_word_embeddings") or hf["text_config"].get("tie_word_embeddings"))


def vision(v: Mapping[str, Any], dtype: str) -> tuple[Glm4vViTConfig, MergerConfig]:
    """The tower and the merger of a vision_config."""
    tower = Glm4vViTConfig(
        **glm_ocr.trunk(v), mlp=v["out_hidden_size"], table=v["image_size"] // v["patch_size"],
        qkv_bias=v.get("attention_bias", False), dtype=dtype,
    )  # fmt: skip
    return tower, MergerConfig(tower.width, v["out_hidden_size"], v["intermediate_size"], dtype=dtype)


def vision_table(cfg: Glm4vViTConfig) -> list[Entry]:
    """The tower, merger not included."""
    hf, ours, n = "model.visual.blocks.{i}.", "vision/blocks/", cfg.depth
    qkv = lambda leaf: tuple(f"{ours}attention/{p}/{leaf}" for p in "qkv")  # noqa: E731
    entries = [
        Entry(hf + "attn.qkv.weight", qkv("kernel"), fused(3), n),
        Entry(hf + "attn.proj.weight", (ours + "attention/o/kernel",), matrix, n),
        Entry(hf + "norm1.weight", (ours + "norm1/scale",), same, n),
        Entry(hf + "norm2.weight", (ours + "norm2/scale",), same, n),
    ]
    entries += [Entry(hf + "attn.qkv.bias", qkv("bias"), fused(3, same), n)] if cfg.qkv_bias else []
    for name in ("gate", "up", "down"):
        entries.append(Entry(f"{hf}mlp.{name}_proj.weight", (f"{ours}mlp/{name}/kernel",), matrix, n))
    return entries + [
        *glm_ocr.ends(cfg),
        Entry("model.visual.embeddings.position_embedding.weight", ("vision/position/embedding",), same),
        Entry("model.visual.post_conv_layernorm.weight", ("vision/embed_norm/scale",), same),
    ]
