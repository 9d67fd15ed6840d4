"""Parity with transformers' GLM-5.3-Flash (glm5_next), randomly initialised, float32: logits with images, padding,
packing and a cache, gradients of every parameter of the decoder, the MTP layer, and the way back.

Linear layers, latent ones with pools of which few are chosen, one that sees what the layer before it saw, dense and
with experts, in runs that are scanned. Not covered: the released weights (none can be fetched here), bfloat16, videos
(whose placeholders are those of images); and the MTP layer as served, which is held to the same layer made of
transformers' parts.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from glmv_jax import models  # noqa: E402
from glmv_jax.interop import glm5_next  # noqa: E402
from glmv_jax.models import MTPConfig, drafting, vlm  # noqa: E402
from glmv_jax.trees import flatten  # noqa: E402
from glmv_jax.typing import TokenInput, UserError  # noqa: E402
from tests.interop import glm4v_oracle as oracle  # noqa: E402

LETTERS = "KFSKK"
TEXT = dict(
    vocab_size=oracle.VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8,
    num_experts_per_tok=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=10, v_head_dim=12, index_topk=8,
    index_kpool=4, index_head_dim=16, index_n_heads=16, linear_head_dim=8, linear_num_heads=4, swiglu_limit=0.7,
    hc_sinkhorn_iters=4, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
VISION = oracle.VISION | dict(out_hidden_size=32, projection_intermediate_size=24, swiglu_limit=0.7)


def kinds(letters: str) -> dict:
    """The lists of a config, the first layer dense."""
    return dict(
        num_hidden_layers=len(letters), mlp_layer_types=["dense"] + ["sparse"] * (len(letters) - 1),
        layer_types=["linear_attention" if x == "K" else "indexed_attention" for x in letters],
        indexer_types=["shared" if x == "S" else "full" for x in letters],
    )  # fmt: skip


def hf_model(letters: str = LETTERS, **text):
    torch.manual_seed(0)
    text = TEXT | kinds(letters) | text
    config = transformers.Glm5NextConfig(text_config=text, vision_config=dict(VISION), **oracle.TOKENS)
    model = transformers.Glm5NextForConditionalGeneration(config)
    oracle.randomise(model.eval())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("dt_bias"):
                p.sub_(3)  # a channel keeps four fifths at a position, not less than a tenth
            elif name.endswith("_hc.scale"):
                p.add_(1)
    return model


@functools.cache
def pair(letters: str = LETTERS, **text) -> oracle.Pair:
    model = hf_model(letters, **text)
    cfg = glm5_next.config(model.config.to_dict())
    params = oracle.table_lib.to_params(glm5_next.table(cfg), oracle.written(model), glm5_next.duplicates(cfg))
    return oracle.Pair(model, cfg, params, glm5_next)


def text_rows(tokens: np.ndarray, start: int) -> TokenInput:
    """Rows of texts alone, from this position on."""
    tokens = jnp.array(tokens, jnp.int32)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1])[None, :, None], (*tokens.shape, 3))
    return TokenInput(tokens, positions, jnp.ones_like(tokens), -jnp.ones_like(tokens))


def test_images_in_padded_rows_and_the_way_back():
    oracle.check_rows(pair(), oracle.IMAGES)
    oracle.check_way_back(pair())


def test_packed_rows_are_texts_alone():
    p, (one, two, text) = pair(), oracle.IMAGES
    rows = [[two, text], [text, one], [two]]
    for row, got in zip(rows, oracle.ours(p, rows)):
        for sample, mine in zip(row, got, strict=True):
            oracle.close(mine, oracle.theirs(p.model, [sample])[0])


def test_decoding_with_a_cache():
    """Rows of prompts of different lengths, padded; then one by one beyond the end of a pool."""
    p, n, steps = pair("KFS"), 9, 5
    tokens, lengths = np.random.default_rng(0).integers(1, oracle.WORDS, (2, n + steps)), np.array([n, 6])
    valid = jnp.array(np.arange(n) < lengths[:, None], jnp.int32)
    given = text_rows(tokens[:, :n], 0)._replace(segments=valid)
    logits, out = oracle.run(p.cfg, p.params, None, given, vlm.init_cache(p.cfg, 2, 28))
    got, cache = [[*x[:k]] for x, k in zip(np.asarray(logits), lengths)], out.cache | {"length": jnp.array(lengths)}
    for i in range(steps):
        one = text_rows(np.take_along_axis(tokens, lengths[:, None] + i, axis=1), 0)
        logits, out = oracle.run(p.cfg, p.params, None, one, cache)
        cache = out.cache
        for row, x in zip(got, np.asarray(logits)):
            row.append(x[0])
    for row, mine in zip(tokens, got):
        with torch.no_grad():
            oracle.close(np.stack(mine), p.model(torch.tensor(row[None, : len(mine)])).logits[0].numpy())


def test_a_text_goes_on_in_pieces():
    p, n = pair("KFS"), 9
    tokens = np.random.default_rng(0).integers(1, oracle.WORDS, (2, 3 * n))
    with torch.no_grad():
        want = p.model(torch.tensor(tokens)).logits.numpy()
    cache = vlm.init_cache(p.cfg, 2, 28)
    for start in range(0, 3 * n, n):
        logits, out = oracle.run(p.cfg, p.params, None, text_rows(tokens[:, start : start + n], start), cache)
        cache = out.cache
        oracle.close(np.asarray(logits), want[:, start : start + n])


def test_gradients_of_the_decoder():
    """Of a random function of a text's logits, and a decay without a floor."""
    p, n = pair("KF", linear_lower_bound=None), 13
    tokens = np.random.default_rng(1).integers(1, oracle.WORDS, (1, n))
    weight = np.random.default_rng(2).normal(size=(1, n, oracle.VOCAB)).astype(np.float32)
    given = text_rows(tokens, 0)

    @jax.jit
    @jax.grad
    def ours(decoder):
        params = p.params | {"decoder": decoder}
        out = vlm.apply(p.cfg, params, None, given)
        return (jnp.tanh(vlm.logits(p.cfg, params, out.hidden)) * weight).sum()

    p.model.zero_grad()
    (torch.tanh(p.model(torch.tensor(tokens)).logits) * torch.tensor(weight)).sum().backward()
    want = flatten(oracle.slopes(p))
    for name, got in flatten({"decoder": ours(p.params["decoder"])}).items():
        size = np.linalg.norm(want[name])
        assert np.linalg.norm(got - want[name]) <= 1e-4 * size, (name, np.linalg.norm(got - want[name]), size)
        assert size > 0 or "router" in name or "/indexer/" in name or "/pool_" in name, name


def test_mtp_layer_is_latent_attention_and_experts_without_streams():
    """Against the layer made of transformers' parts, as it drops the layer itself."""
    from transformers.models.glm5_next import modeling_glm5_next as parts

    p, N = pair("KFS"), 3
    config = transformers.Glm5NextTextConfig(**TEXT | kinds("KFSF"))
    config._attn_implementation = "sdpa"
    norms = {name: parts.Glm5NextTextRMSNorm(32, config.rms_norm_eps) for name in (
        "enorm", "hnorm", "input_layernorm", "post_attention_layernorm", "shared_head_norm")}  # fmt: skip
    layer = torch.nn.ModuleDict(norms | {
        "eh_proj": torch.nn.Linear(64, 32, bias=False), "self_attn": parts.Glm5NextTextAttention(config, N),
        "mlp": parts.Glm5NextTextMoE(config)}).eval()  # fmt: skip
    oracle.randomise(layer)
    tensors = {f"model.language_model.layers.{N}.{name.replace('head_norm', 'head.norm')}": x.detach().numpy()
               for name, x in layer.state_dict().items()}  # fmt: skip
    for e in range(8):
        experts = f"model.language_model.layers.{N}.mlp.experts."
        both = tensors[experts + "gate_up_proj"][e]
        tensors |= {f"{experts}{e}.{n}_proj.weight": x for n, x in zip(("gate", "up"), np.split(both, 2))}
        tensors[f"{experts}{e}.down_proj.weight"] = tensors[experts + "down_proj"][e]
    del tensors[experts + "gate_up_proj"], tensors[experts + "down_proj"]
    cfg = glm5_next.config(p.model.config.to_dict(), mtp_layers=1)
    params = oracle.table_lib.to_params(glm5_next.table(cfg), oracle.written(p.model) | tensors)

    n = 16
    words = np.random.default_rng(1).integers(1, oracle.WORDS, (1, n + 1))
    hidden = np.random.default_rng(2).normal(size=(1, n + 1, 32)).astype(np.float32)
    out = vlm.VLMOutput(jnp.array(hidden), None, jnp.zeros_like(hidden), None, {})
    got = np.asarray(jax.jit(lambda params: vlm.mtp_hidden(cfg, params, out, text_rows(words, 0))[0][0])(params))
    with torch.no_grad():
        e = p.model.get_input_embeddings()(torch.tensor(words[:, 1:]))
        h = torch.tensor(hidden[:, :n])
        x = layer["eh_proj"](torch.cat([layer["enorm"](e), layer["hnorm"](h)], dim=-1))
        x = x + layer["self_attn"](layer["input_layernorm"](x), torch.ones(1, n, dtype=torch.bool))[0]
        x = x + layer["mlp"](layer["post_attention_layernorm"](x))
        oracle.close(got[0, :n], layer["shared_head_norm"](x)[0].numpy())
    with pytest.raises(UserError, match="one state a row"):
        drafting.check(cfg)


def test_released_size():
    """321.3 B with the MTP layer, as those count who converted it; 45 layers, 34 of them linear."""
    hf = transformers.Glm5NextConfig(text_config=dict(index_kpool=4), vision_config=dict(out_hidden_size=4096))
    cfg = glm5_next.config(hf.to_dict())
    assert cfg.decoder == dataclasses.replace(models.GLM5NextConfig(), kinds=cfg.decoder.kinds)
    assert cfg.decoder.letters == models.GLM5NextConfig().letters and cfg.decoder.letters.count("K") == 34
    assert [times for _, times in cfg.decoder.stacks] == [1, 10, 1]
    assert round(models.count(dataclasses.replace(cfg, mtp=MTPConfig(cfg.decoder))) / 1e9, 1) == 321.3


def test_foreign_config_is_refused():
    hf = hf_model().config.to_dict()
    for change, word in (
        ({"index_kpool_always_select_tail": False}, "always_select_tail"),
        ({"qk_rope_head_dim": 8}, "qk_rope_head_dim"),
        ({"mlp_layer_types": ["sparse"] + ["dense"] * 4}, "mlp_layer_types"),
        ({"indexer_types": ["shared"] * 2 + ["full"] * 3}, "must be an F or an S"),
        ({"index_topk": 9}, "whole pools"),
        ({"layer_types": ["mamba"] * 5}, "mamba"),
    ):
        with pytest.raises(UserError, match=word):
            glm5_next.config(hf | {"text_config": hf["text_config"] | change})
