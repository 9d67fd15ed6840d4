"""GLM-5 (transformers `glm_moe_dsa`): its config and its table of tensors, MTP layers included.

Names and shapes: transformers `glm_moe_dsa/modeling_glm_moe_dsa.py`, written as released checkpoints are, an expert a
tensor. Those of MTP layers: `mtp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.interop import mtp
from glmv_jax.interop.table import Entry, Transform, matrix, norm, same
from glmv_jax.models.glm5 import GLM5Config
from glmv_jax.models.vlm import VLMConfig
from glmv_jax.typing import UserError

LAYERS = "model.layers."  # before a layer's number


def config(hf: Mapping[str, Any], *, mtp_layers: int = 0, dtype: str = "float32") -> VLMConfig:
    """VLMConfig without a vision side, from the contents of config.json. UserError for what this model cannot do."""
    if hf.get("model_type") != "glm_moe_dsa":
        raise UserError(f"config.json: model_type {hf.get('model_type')!r} is not glm_moe_dsa")
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 1e6)}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"config.json: rope_type {rope['rope_type']!r} is not supported, only 'default'")
    if hf.get("attention_bias") or hf.get("mlp_bias"):
        raise UserError("config.json: attention_bias and mlp_bias are not supported; GLM-5 has neither")
    depth, rope_dim = hf["num_hidden_layers"], hf["qk_rope_head_dim"]
    mlps = hf.get("mlp_layer_types") or ["dense"] * hf.get("first_k_dense_replace", 3) + ["sparse"] * depth
    dense = mlps[:depth].index("sparse") if "sparse" in mlps[:depth] else depth
    if "dense" in mlps[dense:depth]:
        raise UserError("config.json: mlp_layer_types has a dense layer after a sparse one, which is not supported")
    third = rope_dim // 8  # of the frequencies for each of height and width three eighths, as 8 : 12 : 12
    decoder = GLM5Config(
        vocab=hf["vocab_size"], depth=depth, width=hf["hidden_size"], heads=hf["num_attention_heads"],
        q_rank=hf["q_lora_rank"], kv_rank=hf["kv_lora_rank"], nope_dim=hf["qk_nope_head_dim"], rope_dim=rope_dim,
        v_dim=hf["v_head_dim"], index_heads=hf["index_n_heads"], index_dim=hf["index_head_dim"],
        top_k=hf["index_topk"], index=index(hf, depth), mlp=hf["intermediate_size"], dense=dense,
        expert_mlp=hf["moe_intermediate_size"], experts=hf["n_routed_experts"], chosen=hf["num_experts_per_tok"],
        shared=hf["n_shared_experts"], groups=hf.get("n_group", 1), chosen_groups=hf.get("topk_group", 1),
        normalise=hf.get("norm_topk_prob", True), route_scale=hf.get("routed_scaling_factor", 1.0),
        rope_theta=rope["rope_theta"], rope_split=(third, *_halves(rope_dim // 2 - third)),
        norm_eps=hf["rms_norm_eps"], tied=bool(hf.get("tie_word_embeddings", False)), dtype=dtype,
    )  # fmt: skip
    return VLMConfig(None, None, decoder, mtp.config(decoder, mtp_layers))


def _halves(n: int) -> tuple[int, int]:
    return n // 2, n - n // 2


def index(hf: Mapping[str, Any], depth: int) -> str:
    """Letters of `GLM5Config.index`; "" where every layer has an indexer."""
    kinds = hf.get("indexer_types")
    if kinds is None and hf.get("index_topk_pattern"):
        kinds = [{"F": "full", "S": "shared"}.get(kind, kind) for kind in hf["index_topk_pattern"]]
    if kinds is None:
        every, offset = max(hf.get("index_topk_freq", 1), 1), hf.get("index_skip_topk_offset", 2)
        kinds = ["shared" if max(i - offset + 1, 0) % every else "full" for i in range(depth)]
    letters = "".join("F" if kind == "full" else "S" for kind in kinds[:depth])
    return letters if "S" in letters else ""


def table(cfg: VLMConfig) -> list[Entry]:
    """Every tensor of the family for a model of this config."""
    d = cfg.decoder
    block = lambda hf, ours, numbers: _layer(d, hf, f"{ours}layer0/", "moe", True, numbers)  # noqa: E731
    return _decoder(d) + mtp.table(cfg.mtp, d.depth, LAYERS, block)


def duplicates(cfg: VLMConfig) -> list[str]:
    """See `mtp.duplicates`."""
    return mtp.duplicates(cfg, LAYERS)


def _decoder(cfg: GLM5Config) -> list[Entry]:
    entries = [
        Entry("model.embed_tokens.weight", ("decoder/embed/embedding",), same),
        Entry("model.norm.weight", ("decoder/norm/scale",), same),
    ]
    entries += [] if cfg.tied else [Entry("lm_head.weight", ("decoder/head",), matrix)]
    first = 0
    for s, (unit, times) in enumerate(cfg.stacks):
        size = len(unit.mlps)
        for j, mlp in enumerate(unit.mlps):
            numbers = range(first + j, first + size * times, size)
            entries += _layer(cfg, LAYERS + "{i}.", f"decoder/blocks{s}/layer{j}/", mlp, j == 0, numbers)
        first += size * times
    return entries


def _layer(cfg: GLM5Config, hf: str, ours: str, mlp: str, indexed: bool, numbers: Sequence[int] | None) -> list[Entry]:
    return norms(hf, ours, numbers) + attention(cfg, hf, ours, indexed, numbers) + mlps(cfg, hf, ours, mlp, numbers)


def norms(hf: str, ours: str, numbers: Sequence[int] | None) -> list[Entry]:
    """Those before the two branches of a layer."""
    names = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    return [Entry(f"{hf}{t}.weight", (f"{ours}{o}/scale",), same, numbers) for t, o in names.items()]


def attention(cfg: Any, hf: str, ours: str, indexed: bool, numbers: Sequence[int] | None) -> list[Entry]:
    """Latent attention, with an indexer or without."""

    def one(theirs: str, path: str, transform: Transform = matrix) -> Entry:
        return Entry(f"{hf}{theirs}", (ours + path,), transform, numbers)

    entries = [
        one("self_attn.q_a_proj.weight", "attention/q_a/kernel"),
        one("self_attn.q_a_layernorm.weight", "attention/q_norm/scale", same),
        one("self_attn.q_b_proj.weight", "attention/q_b/kernel"),
        one("self_attn.kv_a_proj_with_mqa.weight", "attention/kv_a/kernel"),
        one("self_attn.kv_a_layernorm.weight", "attention/kv_norm/scale", same),
        one("self_attn.o_proj.weight", "attention/o/kernel"),
        Entry(f"{hf}self_attn.kv_b_proj.weight", (ours + "attention/uk", ours + "attention/uv"),
              _keys_and_values(cfg), numbers),
    ]  # fmt: skip
    if indexed:
        indexer = hf + "self_attn.indexer."
        names = {"wq_b": "q", "wk": "k", "weights_proj": "weights"}
        entries += [one(f"self_attn.indexer.{t}.weight", f"attention/indexer/{o}/kernel") for t, o in names.items()]
        entries += norm(indexer + "k_norm", ours + "attention/indexer/k_norm", numbers)
    return entries


def mlps(cfg: Any, hf: str, ours: str, mlp: str, numbers: Sequence[int] | None) -> list[Entry]:
    """A layer's MLP, or its experts."""

    def one(theirs: str, path: str, transform: Transform = matrix) -> Entry:
        return Entry(f"{hf}{theirs}", (ours + path,), transform, numbers)

    three = ("gate", "up", "down")
    if mlp == "dense":
        return [one(f"mlp.{n}_proj.weight", f"mlp/{n}/kernel") for n in three]
    entries = [
        one("mlp.gate.weight", "moe/router"),
        one("mlp.gate.e_score_correction_bias", "moe/router_bias", same),
    ]
    experts = hf + "mlp.experts.{e}."
    entries += [Entry(f"{experts}{n}_proj.weight", (f"{ours}moe/{n}",), matrix, numbers, cfg.experts) for n in three]
    shared = [one(f"mlp.shared_experts.{n}_proj.weight", f"moe/shared/{n}/kernel") for n in three]
    return entries + (shared if cfg.shared else [])


def _keys_and_values(cfg: Any) -> Transform:
    """kv_b_proj [H * (N + V), C], keys and values of a head together, is our uk [C, H * N] and uv [C, H * V]."""
    H, N, V = cfg.heads, cfg.nope_dim, cfg.v_dim

    def load(tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        keys, values = np.split(tensor.reshape(H, N + V, -1), [N], axis=1)
        return tuple(x.reshape(-1, x.shape[-1]).T for x in (keys, values))

    def save(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        keys, values = (a.T.reshape(H, -1, a.shape[0]) for a in arrays)
        return np.concatenate([keys, values], axis=1).reshape(H * (N + V), -1)

    return Transform(load, save)
