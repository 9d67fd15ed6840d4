"""GLM-4.5V and GLM-4.6V (transformers `glm4v_moe`): their config and their table of tensors.

Vision, and what is said about an MTP layer, is GLM-4.1V's. Released checkpoints, and those that transformers writes,
have a tensor an expert; in memory transformers has all in one, a form that is not read here. Names: transformers
`glm4v_moe/modeling_glm4v_moe.py` and its `conversion_mapping.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from glmv_jax.interop import glm4v, glm_ocr, mtp
from glmv_jax.interop.glm4v import duplicates
from glmv_jax.interop.table import Entry, matrix, same
from glmv_jax.models.block import BlockConfig
from glmv_jax.models.glm4_moe import GLM4MoEConfig, MoEBlockConfig
from glmv_jax.models.vlm import VLMConfig
from glmv_jax.typing import UserError

__all__ = ["config", "duplicates", "table"]


def config(hf: Mapping[str, Any], *, mtp_layers: int = 0, dtype: str = "float32") -> VLMConfig:
    """VLMConfig from the contents of config.json. UserError for another model_type, an unsupported rotary type, or a
    QK-norm, which no released model of the family has."""
    v, t = glm4v.parts(hf, "glm4v_moe")
    if t.get("use_qk_norm"):
        raise UserError("config.json: use_qk_norm is true, but transformers' glm4v_moe has no QK-norm; set it to false")
    decoder = text(t, tied=glm4v.tied(hf), dtype=dtype)
    return VLMConfig(*glm4v.vision(v, dtype), decoder, mtp.config(decoder, mtp_layers))


def text(t: Mapping[str, Any], *, tied: bool, dtype: str = "float32") -> GLM4MoEConfig:
    """The decoder of a text_config; of a whole config.json where the model is GLM-4.5 (`glm4_moe`), which has text
    alone."""
    return GLM4MoEConfig(
        **glm_ocr.text(t, rotary_fraction=0.5), mlp=t["intermediate_size"], dense=t["first_k_dense_replace"],
        expert_mlp=t["moe_intermediate_size"], experts=t["n_routed_experts"], chosen=t["num_experts_per_tok"],
        shared=t["n_shared_experts"], groups=t["n_group"], chosen_groups=t["topk_group"],
        normalise=t["norm_topk_prob"], route_scale=t["routed_scaling_factor"], qkv_bias=t["attention_bias"],
        qk_norm=t.get("use_qk_norm", False), tied=tied, dtype=dtype,
    )  # fmt: skip


def table(cfg: VLMConfig) -> list[Entry]:
    """Every tensor of the family for a model of this config."""
    d = cfg.decoder
    encoder: Any = cfg.vision  # a Glm4vViTConfig
    entries = [*glm4v.vision_table(encoder), *glm_ocr.merger(), *decoder(d)]
    return entries + mtp.table(cfg.mtp, d.depth, glm_ocr.LAYERS, functools.partial(_block, d.block))


def decoder(cfg: GLM4MoEConfig) -> list[Entry]:
    """The decoder with its table and head."""
    entries, first = [], 0
    for i, (block, times) in enumerate(cfg.stacks):
        layers = range(first, first + times)
        entries += _block(block, glm_ocr.LAYERS + "{i}.", f"decoder/blocks{i}/", layers)
        first += times
    return entries + glm_ocr.words(cfg)


def _block(cfg: BlockConfig, hf: str, ours: str, layers: Sequence[int] | None = None) -> list[Entry]:
    norms = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    norms |= {f"self_attn.{p}_norm": f"attention/{p}_norm" for p in "qk"} if cfg.qk_norm else {}
    attention = f"{ours}attention/"
    return [
        *(Entry(f"{hf}{t}.weight", (f"{ours}{o}/scale",), same, layers) for t, o in norms.items()),
        *(Entry(f"{hf}self_attn.{p}_proj.weight", (f"{attention}{p}/kernel",), matrix, layers) for p in "qkvo"),
        *(Entry(f"{hf}self_attn.{p}_proj.bias", (f"{attention}{p}/bias",), same, layers) for p in cfg.biases),
        *_mlp(cfg, hf + "mlp.", ours, layers),
    ]


def _mlp(cfg: BlockConfig, hf: str, ours: str, layers: Sequence[int] | None) -> list[Entry]:
    def matrices(theirs: str, path: str, leaf: str = "", experts: int | None = None) -> list[Entry]:
        names = ("gate", "up", "down")
        return [Entry(f"{theirs}{n}_proj.weight", (f"{path}{n}{leaf}",), matrix, layers, experts) for n in names]

    if not isinstance(cfg, MoEBlockConfig):
        return matrices(hf, ours + "mlp/", "/kernel")
    entries = [
        Entry(hf + "gate.weight", (ours + "moe/router",), matrix, layers),
        Entry(hf + "gate.e_score_correction_bias", (ours + "moe/router_bias",), same, layers),
        *matrices(hf + "experts.{e}.", ours + "moe/", experts=cfg.moe.experts),
    ]
    return entries + (matrices(hf + "shared_experts.", ours + "moe/shared/", "/kernel") if cfg.moe.shared else [])
