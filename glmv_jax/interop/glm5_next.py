"""GLM-5.3-Flash (transformers `glm5_next`): its config and its table of tensors, MTP layer included.

Names as released checkpoints and transformers' own have them: transformers `glm5_next/modeling_glm5_next.py` and its
`conversion_mapping.py`. The MTP layer, which transformers drops, is a latent layer without streams (vLLM, `glm5next`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmv_jax.interop import glm4v, glm_moe_dsa, glm_ocr, mtp
from glmv_jax.interop.glm_ocr import duplicates
from glmv_jax.interop.table import Entry, Transform, matrix, same
from glmv_jax.models.cogvit import CogViTConfig, MergerConfig
from glmv_jax.models.glm5_next import GLM5NextConfig
from glmv_jax.models.hyper_connections import StreamsConfig
from glmv_jax.models.vlm import VLMConfig
from glmv_jax.typing import UserError

__all__ = ["config", "duplicates", "table"]

_NEEDED = {"attention_bias": False, "hidden_act": "silu", "index_kpool_always_select_tail": True, "qk_rope_head_dim": 0}

# "": the letter of its indexer
_KINDS = {"linear_attention": "K", "indexed_attention": "", "full_attention": "", "deepseek_sparse_attention": ""}


def config(hf: Mapping[str, Any], *, mtp_layers: int = 0, dtype: str = "float32") -> VLMConfig:
    """VLMConfig from the contents of config.json. UserError for what this model cannot do."""
    v, t = glm4v.parts(hf, "glm5_next")
    for name, needed in _NEEDED.items():
        if t.get(name, needed) != needed:
            raise UserError(f"config.json: {name}={t[name]!r} in text_config is not supported, only {needed!r}")
    if not v.get("attention_bias", True):
        raise UserError("config.json: attention_bias=False in vision_config is not supported; CogViT has biases")
    limit = v["swiglu_limit"]
    vision = CogViTConfig(**glm_ocr.trunk(v), mlp=v["intermediate_size"], swiglu_limit=limit, dtype=dtype)
    hidden = v["projection_intermediate_size"]
    merger = MergerConfig(vision.width, v["out_hidden_size"], hidden, swiglu_limit=limit, dtype=dtype)
    decoder = _text(t, glm4v.tied(hf), dtype)
    return VLMConfig(vision, merger, decoder, mtp.config(decoder, mtp_layers))


def _text(t: Mapping[str, Any], tied: bool, dtype: str) -> GLM5NextConfig:
    depth, eps = t["num_hidden_layers"], t["rms_norm_eps"]
    return GLM5NextConfig(
        vocab=t["vocab_size"], depth=depth, width=t["hidden_size"], heads=t["num_attention_heads"],
        kinds=_kinds(t, depth), q_rank=t["q_lora_rank"], kv_rank=t["kv_lora_rank"], nope_dim=t["qk_nope_head_dim"],
        v_dim=t["v_head_dim"], index_heads=t["index_n_heads"], index_dim=t["index_head_dim"], top_k=t["index_topk"],
        pool=t["index_kpool"], **_linear(t),
        streams=StreamsConfig(t["hc_mult"], t["hc_sinkhorn_iters"], t["hc_eps"], eps),
        mlp=t["intermediate_size"], dense=_dense(t, depth), expert_mlp=t["moe_intermediate_size"],
        experts=t["n_routed_experts"], chosen=t["num_experts_per_tok"], shared=t["n_shared_experts"],
        groups=t.get("n_group", 1), chosen_groups=t.get("topk_group", 1), normalise=t.get("norm_topk_prob", True),
        route_scale=t["routed_scaling_factor"], swiglu_limit=t["swiglu_limit"], norm_eps=eps, tied=tied, dtype=dtype,
    )  # fmt: skip


def _linear(t: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of linear attention: one by one, or in "linear_attn_config" with other names."""
    names = {"head_dim": "linear_dim", "num_heads": "linear_heads", "short_conv_kernel_size": "linear_taps",
             "gate_lower_bound": "linear_floor"}  # fmt: skip
    theirs = ("linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim", "linear_lower_bound")
    together = t.get("linear_attn_config") or {}
    found = {o: together[n] if n in together else t[other] for (n, o), other in zip(names.items(), theirs)}
    if together.get("safe_gate", bool(together)) and found["linear_floor"] is None:
        found["linear_floor"] = -5.0
    return found


def _kinds(t: Mapping[str, Any], depth: int) -> str:
    """Letters of `GLM5NextConfig.kinds`."""
    kinds = t.get("layer_types") or ["linear_attention" if i % 4 != 3 else "indexed_attention" for i in range(depth)]
    if unknown := sorted(set(kinds) - _KINDS.keys()):
        raise UserError(f"config.json: layer_types has {unknown[0]!r}; known are {', '.join(_KINDS)}")
    shared = glm_moe_dsa.index(t, depth) or "F" * depth
    return "".join(_KINDS[kind] or letter for kind, letter in zip(kinds[:depth], shared))


def _dense(t: Mapping[str, Any], depth: int) -> int:
    """How many layers have a plain MLP, which are the first."""
    kinds = (t.get("mlp_layer_types") or ["dense"] * 3 + ["sparse"] * depth)[:depth]
    dense = kinds.count("dense")
    if "sparse" in kinds[:dense]:
        raise UserError("config.json: mlp_layer_types has a dense layer after a sparse one, which is not supported")
    return dense


def table(cfg: VLMConfig) -> list[Entry]:
    """Every tensor of the family for a model of this config."""
    d, entries, first = cfg.decoder, [*glm_ocr.tower(cfg.vision), *glm_ocr.merger()], 0
    for s, (unit, times) in enumerate(d.stacks):
        size = len(unit.layers)
        for j, (kind, mlp) in enumerate(unit.layers):
            numbers = range(first + j, first + size * times, size)
            hf, ours = glm_ocr.LAYERS + "{i}.", f"decoder/blocks{s}/layer{j}/"
            entries += _layer(d, hf, ours, kind, mlp, numbers) + _streams(hf, ours, numbers)
        first += size * times
    block = lambda hf, ours, numbers: _layer(d, hf, f"{ours}layer0/", "F", "moe", numbers)  # noqa: E731
    return entries + glm_ocr.words(d) + mtp.table(cfg.mtp, d.depth, glm_ocr.LAYERS, block)


def _layer(cfg: GLM5NextConfig, hf: str, ours: str, kind: str, mlp: str, numbers: Sequence[int] | None) -> list[Entry]:
    entries = glm_moe_dsa.norms(hf, ours, numbers) + glm_moe_dsa.mlps(cfg, hf, ours, mlp, numbers)
    if kind == "K":
        return entries + _delta(hf + "self_attn.", ours + "attention/", numbers)
    entries += glm_moe_dsa.attention(cfg, hf, ours, kind == "F", numbers)
    if kind == "F":
        indexer = hf + "self_attn.indexer.index_kpool_compress_"
        entries += [
            Entry(indexer + "ape", (ours + "attention/pool_place_bias",), same, numbers),
            Entry(indexer + "gate", (ours + "attention/pool_score/kernel",), matrix, numbers),
        ]
    return entries


_taps = Transform(lambda t: (t[:, 0].T,), lambda a: a[0].T[:, None])  # depthwise [M, 1, W] <-> [W, M]


def _delta(hf: str, ours: str, numbers: Sequence[int] | None) -> list[Entry]:
    """Linear attention."""
    linear = {f"{n}_proj": n for n in (*"qkvob", "f_a", "f_b", "g_a", "g_b")}
    rest = {"dt_bias": ("dt_bias", same), "A_log": ("log_gain", same), "o_norm.weight": ("scale", same)}
    rest |= {f"{n}_conv1d.weight": (f"{n}_conv", _taps) for n in "qkv"}
    return [
        *(Entry(f"{hf}{t}.weight", (f"{ours}{o}/kernel",), matrix, numbers) for t, o in linear.items()),
        *(Entry(hf + t, (ours + o,), transform, numbers) for t, (o, transform) in rest.items()),
    ]


def _streams(hf: str, ours: str, numbers: Sequence[int] | None) -> list[Entry]:
    """Hyper-connections around both branches."""
    parts = {"fn": ("mix", matrix), "base": ("mix_bias", same), "scale": ("mix_scale", same)}
    branches = {"attn": "streams1", "ffn": "streams2"}
    return [
        Entry(f"{hf}hc_{b}_{t}", (f"{ours}{to}/{o}",), transform, numbers)
        for b, to in branches.items() for t, (o, transform) in parts.items()
    ]  # fmt: skip
