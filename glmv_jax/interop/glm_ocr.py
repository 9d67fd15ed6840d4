"""GLM-OCR (transformers `glm_ocr`): its config and its table of tensors, MTP layers included.

Names and shapes: transformers `glm_ocr/modeling_glm_ocr.py`; those of MTP layers: `mtp`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from glmv_jax.interop import mtp
from glmv_jax.interop.table import Entry, convolution, fused, linear, matrix, same
from glmv_jax.models.block import BlockConfig
from glmv_jax.models.cogvit import CogViTConfig, MergerConfig
from glmv_jax.models.decoder import DecoderConfig
from glmv_jax.models.vlm import VLMConfig
from glmv_jax.typing import UserError

LAYERS = "model.language_model.layers."  # before a layer's number


def config(hf: Mapping[str, Any], *, mtp_layers: int = 0, dtype: str = "float32") -> VLMConfig:
    """VLMConfig from the contents of config.json. UserError for another model_type or an unsupported rotary type."""
    if hf.get("model_type") != "glm_ocr":
        raise UserError(f"config.json: model_type {hf.get('model_type')!r} is not glm_ocr")
    v, t = hf["vision_config"], hf["text_config"]
    vision = CogViTConfig(**trunk(v), mlp=v["intermediate_size"], dtype=dtype)
    merger = MergerConfig(vision.width, v["out_hidden_size"], v["out_hidden_size"] * v["in_channels"], dtype=dtype)
    tied = bool(hf.get("tie_word_embeddings", False))
    decoder = DecoderConfig(**text(t), mlp=t["intermediate_size"], tied=tied, dtype=dtype)
    return VLMConfig(vision, merger, decoder, mtp.config(decoder, mtp_layers))


def trunk(v: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a vision tower's config that are named alike in all GLM families."""
    rope = v.get("rope_parameters") or {}
    return dict(
        depth=v["depth"], width=v["hidden_size"], heads=v["num_heads"], patch=v["patch_size"],
        temporal_patch=v["temporal_patch_size"], channels=v["in_channels"], rope_theta=rope.get("rope_theta", 1e4),
        norm_eps=v["rms_norm_eps"],
    )  # fmt: skip


def text(t: Mapping[str, Any], rotary_fraction: float = 1.0) -> dict[str, Any]:
    """Fields of a decoder's config that are named alike in all GLM families; rotary_fraction: where none is given.

    Rotary numbers stand in "rope_parameters", before transformers 5 in "rope_scaling" and beside it.
    """
    rope = {name: t[name] for name in ("rope_theta", "partial_rotary_factor") if name in t}
    rope |= t.get("rope_parameters") or t.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: rope_type {kind!r} is not supported, only 'default'")
    head_dim = t.get("head_dim") or t["hidden_size"] // t["num_attention_heads"]
    split = tuple(rope.get("mrope_section", (8, 12, 12)))
    rotary_fraction = rope.get("partial_rotary_factor", rotary_fraction)
    if len(split) != 3 or 2 * sum(split) != int(head_dim * rotary_fraction):
        raise UserError(
            f"config.json: mrope_section {list(split)} does not share out the {head_dim} * {rotary_fraction} rotary "
            "dimensions of a head among time, height and width"
        )
    return dict(
        vocab=t["vocab_size"], depth=t["num_hidden_layers"], width=t["hidden_size"], heads=t["num_attention_heads"],
        kv_heads=t["num_key_value_heads"], head_dim=head_dim, rope_theta=rope.get("rope_theta", 1e4), rope_split=split,
        rotary_fraction=rotary_fraction, norm_eps=t["rms_norm_eps"],
    )  # fmt: skip


def table(cfg: VLMConfig) -> list[Entry]:
    """Every tensor of the family for a model of this config."""
    return [*tower(cfg.vision), *merger(), *decoder(cfg)]


def duplicates(cfg: VLMConfig) -> list[str]:
    """See `mtp.duplicates`."""
    return mtp.duplicates(cfg, LAYERS)


def tower(cfg: CogViTConfig) -> list[Entry]:
    """CogViT."""
    hf, ours, n = "model.visual.blocks.{i}.", "vision/blocks/", cfg.depth
    qkv = lambda leaf: tuple(f"{ours}attention/{p}/{leaf}" for p in "qkv")  # noqa: E731
    entries = [
        Entry(hf + "attn.qkv.weight", qkv("kernel"), fused(3), n),
        Entry(hf + "attn.qkv.bias", qkv("bias"), fused(3, same), n),
        Entry(hf + "attn.q_norm.weight", (ours + "attention/q_norm/scale",), same, n),
        Entry(hf + "attn.k_norm.weight", (ours + "attention/k_norm/scale",), same, n),
        Entry(hf + "norm1.weight", (ours + "norm1/scale",), same, n),
        Entry(hf + "norm2.weight", (ours + "norm2/scale",), same, n),
        *linear(hf + "attn.proj", ours + "attention/o", n),
    ]
    for name in ("gate", "up", "down"):
        entries += linear(f"{hf}mlp.{name}_proj", f"{ours}mlp/{name}", n)
    return entries + ends(cfg)


def ends(cfg: CogViTConfig) -> list[Entry]:
    """What a vision tower has before and after its blocks."""
    # Conv3d over (C, T, y, x): our patch vector holds them in that very order.
    patch = convolution((0, 1, 2, 3), (cfg.temporal_patch, cfg.patch, cfg.patch))
    return [
        Entry("model.visual.patch_embed.proj.weight", ("vision/patch_embed/kernel",), patch),
        Entry("model.visual.patch_embed.proj.bias", ("vision/patch_embed/bias",), same),
        Entry("model.visual.post_layernorm.weight", ("vision/norm/scale",), same),
    ]


def merger() -> list[Entry]:
    """The merger and the downsampling before it."""
    hf, ours = "model.visual.merger.", "merger/"
    # Conv2d 2x2 over channels: our input is four neighbours (y, x) side by side, channels inside.
    entries = [
        Entry("model.visual.downsample.weight", (ours + "downsample/kernel",), convolution((1, 2, 0), (2, 2))),
        Entry("model.visual.downsample.bias", (ours + "downsample/bias",), same),
        Entry(hf + "proj.weight", (ours + "proj/kernel",), matrix),
        Entry(hf + "post_projection_norm.weight", (ours + "norm/scale",), same),
        Entry(hf + "post_projection_norm.bias", (ours + "norm/bias",), same),
    ]
    return entries + [Entry(f"{hf}{n}_proj.weight", (f"{ours}mlp/{n}/kernel",), matrix) for n in ("gate", "up", "down")]


def block(cfg: BlockConfig, hf: str, ours: str, layers: Sequence[int] | int | None = None) -> list[Entry]:
    """A dense block with norms on both sides of its branches."""
    norms = {
        "input_layernorm": "norm1",
        "post_self_attn_layernorm": "post_norm1",
        "post_attention_layernorm": "norm2",
        "post_mlp_layernorm": "post_norm2",
    }
    entries = [Entry(f"{hf}{t}.weight", (f"{ours}{o}/scale",), same, layers) for t, o in norms.items()]
    entries += [
        Entry(f"{hf}self_attn.{p}_proj.weight", (f"{ours}attention/{p}/kernel",), matrix, layers) for p in "qkvo"
    ]
    entries += [Entry(f"{hf}self_attn.{p}_proj.bias", (f"{ours}attention/{p}/bias",), same, layers) for p in cfg.biases]
    gate_up = (f"{ours}mlp/gate/kernel", f"{ours}mlp/up/kernel")
    return entries + [
        Entry(hf + "mlp.gate_up_proj.weight", gate_up, fused(2), layers),
        Entry(hf + "mlp.down_proj.weight", (f"{ours}mlp/down/kernel",), matrix, layers),
    ]


def decoder(cfg: VLMConfig) -> list[Entry]:
    """The dense decoder with its table and head, and the MTP layer where there is one."""
    d = cfg.decoder
    one = functools.partial(block, d.block)
    entries = one(LAYERS + "{i}.", "decoder/blocks/", d.depth) + words(d)
    return entries + mtp.table(cfg.mtp, d.depth, LAYERS, one)


def words(cfg: Any) -> list[Entry]:
    """A decoder's table, last norm and head."""
    hf = "model.language_model."
    entries = [
        Entry(hf + "embed_tokens.weight", ("decoder/embed/embedding",), same),
        Entry(hf + "norm.weight", ("decoder/norm/scale",), same),
    ]
    return entries + ([] if cfg.tied else [Entry("lm_head.weight", ("decoder/head",), matrix)])
