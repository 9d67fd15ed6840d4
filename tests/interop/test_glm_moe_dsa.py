"""Parity with transformers' GLM-5 (`glm_moe_dsa`), randomly initialised, float32, through a folder it wrote itself.

Covers sparse attention with more keys than the indexer keeps, layers that share an indexer's choice, router groups,
padding, packing, decoding with the cache, gradients, and the way back. Does not cover the released weights nor the MTP
layer, which transformers drops; that is a round trip only.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from glmv_jax import models  # noqa: E402
from glmv_jax.interop import folder as folder_lib  # noqa: E402
from glmv_jax.interop import glm_moe_dsa  # noqa: E402
from glmv_jax.interop import table as table_lib  # noqa: E402
from glmv_jax.models import MTPConfig, vlm  # noqa: E402
from glmv_jax.typing import TokenInput, UserError  # noqa: E402

T, TOP_K, VOCAB = 24, 6, 96
VARIANTS = {
    "full": dict(num_hidden_layers=3),
    "shared": dict(num_hidden_layers=5, indexer_types=["full"] + ["full", "shared"] * 2, first_k_dense_replace=1),
    "groups": dict(num_hidden_layers=3, n_group=4, topk_group=2, n_shared_experts=2),
    "all": dict(num_hidden_layers=3, index_topk=64),
}


def hf_model(variant: str):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=24,
        qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=10, index_topk=TOP_K, index_head_dim=16,
        index_n_heads=16,  # where a key makes all of few heads 0, it ties with others, and torch's choice is its own
        first_k_dense_replace=2, max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    config = transformers.GlmMoeDsaConfig(**(sizes | VARIANTS[variant]))
    model = transformers.GlmMoeDsaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name:
                p.copy_(0.2 * torch.randn(p.shape))
            elif p.ndim == 1 and "inv_freq" not in name:
                p.copy_((1.0 if name.endswith("weight") else 0.0) + 0.3 * torch.randn(p.shape))
            elif p.ndim > 1:
                p.copy_(torch.randn(p.shape) * 1.5 / p.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, tmp_path_factory):
    """(transformers' model, our config, our parameters, the tensors on disk)."""
    model, folder = hf_model(request.param), tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder, max_shard_size="40KB")
    cfg = glm_moe_dsa.config(folder_lib.read_config(folder))
    tensors = folder_lib.Tensors(folder)
    return model, cfg, table_lib.to_params(glm_moe_dsa.table(cfg), tensors), tensors


def rows(lengths_of_rows: list[list[int]], seed: int = 0) -> TokenInput:
    """Random tokens; each row holds documents of these lengths, then padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (len(lengths_of_rows), T))
    positions, segments = np.zeros((2, *tokens.shape), np.int32)
    for b, lengths in enumerate(lengths_of_rows):
        start = 0
        for number, n in enumerate(lengths, start=1):
            positions[b, start : start + n], segments[b, start : start + n] = np.arange(n), number
            start += n
    return TokenInput(
        jnp.array(tokens, jnp.int32), jnp.repeat(jnp.array(positions)[..., None], 3, axis=2), jnp.array(segments),
        -jnp.ones(tokens.shape, jnp.int32),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, params, tokens: TokenInput, cache=None):
    """(logits [B, T, V], cache)."""
    out = vlm.apply(cfg, params, None, tokens, cache)
    return vlm.logits(cfg, params, out.hidden), out.cache


def ours(cfg, params, tokens: TokenInput) -> np.ndarray:
    return np.asarray(run(cfg, params, tokens)[0])


def theirs(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def test_logits_match_with_padding(both):
    model, cfg, params, _ = both
    tokens = rows([[T], [13]])
    got = ours(cfg, params, tokens)
    np.testing.assert_allclose(got[:1], theirs(model, tokens.tokens[:1]), atol=1e-4)
    np.testing.assert_allclose(got[1:, :13], theirs(model, tokens.tokens[1:, :13]), atol=1e-4)


def test_packed_documents_are_as_alone(both):
    model, cfg, params, _ = both
    tokens = rows([[9, 14]])
    got = ours(cfg, params, tokens)
    np.testing.assert_allclose(got[:, :9], theirs(model, tokens.tokens[:, :9]), atol=1e-4)
    np.testing.assert_allclose(got[:, 9:23], theirs(model, tokens.tokens[:, 9:23]), atol=1e-4)


def test_decoding_matches(both):
    """A prompt of 11 of 14 slots, then six tokens one by one (one query: the latents of chosen keys are gathered), then
    four at once."""
    model, cfg, params, _ = both
    tokens = rows([[T], [T]], seed=1)
    whole = theirs(model, tokens.tokens)

    def step(cache, start, n):
        part = TokenInput(*(x[:, start : start + n] for x in tokens[:4]))
        logits, cache = run(cfg, params, part, cache)
        np.testing.assert_allclose(logits, whole[:, start : start + n], atol=1e-4)
        return cache

    cache = step(vlm.init_cache(cfg, 2, T + 2), 0, 11)
    for t in range(11, 17):
        cache = step(cache, t, 1)
    step(cache, 17, 4)


def test_prompts_shared_by_a_group(both):
    model, cfg, params, _ = both
    tokens = rows([[T], [T]], seed=2)
    prompt = TokenInput(*(x[:, :9] for x in tokens[:4]))
    lengths = jnp.array([9, 5])
    cache = run(cfg, params, prompt, vlm.init_cache(cfg, 2, 9))[1] | {"length": lengths}
    cache = vlm.share_prompts(cfg, cache, 2, 3)
    said = jnp.array([[5, 6], [7, 8], [9, 10], [11, 12]], jnp.int32)
    positions = jnp.repeat(lengths, 2)[:, None, None] + jnp.arange(2)[None, :, None] + jnp.zeros((1, 1, 3), jnp.int32)
    more = TokenInput(said, positions, jnp.ones_like(said), -jnp.ones_like(said))
    got = run(cfg, params, more, cache)[0]
    for row in range(4):
        n = int(lengths[row // 2])
        want = theirs(model, np.concatenate([tokens.tokens[row // 2, :n], said[row]])[None])
        np.testing.assert_allclose(got[row], want[0, n:], atol=1e-4)


def test_gradients_match(both):
    model, cfg, params, _ = both
    tokens = rows([[T]], seed=3)
    weight = np.random.default_rng(4).normal(size=(1, T, VOCAB)).astype(np.float32) / T

    def loss(params):
        return (run(cfg, params, tokens)[0] * weight).sum()

    grads = table_lib.to_tensors(glm_moe_dsa.table(cfg), jax.jit(jax.grad(loss))(params))
    model.zero_grad()
    (model(torch.tensor(np.asarray(tokens.tokens), dtype=torch.long)).logits * torch.tensor(weight)).sum().backward()
    compared = 0
    for name, p in model.named_parameters():
        want = np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:  # ours are named as on disk, one by one
            base, _, kind = name.rpartition(".")
            halves = np.split(want, 2, axis=1) if kind == "gate_up_proj" else [want]
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            pairs = [(f"{base}.{e}.{n}.weight", h[e]) for n, h in zip(parts, halves) for e in range(len(h))]
        else:
            pairs = [(name, want)]
        for key, value in pairs:
            scale = max(np.abs(value).max(), 1e-2)
            np.testing.assert_allclose(grads[key] / scale, value / scale, atol=1e-4, err_msg=key)
            compared += 1
    assert compared >= len(grads) - sum("correction_bias" in name for name in grads)
    assert not any(np.any(g) for name, g in grads.items() if "indexer" in name or "correction_bias" in name)


def test_way_back(both):
    _, cfg, params, tensors = both
    back = table_lib.to_tensors(glm_moe_dsa.table(cfg), params)
    assert set(back) == set(tensors)
    for name in back:
        np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)


def test_mtp_layer_goes_both_ways():
    cfg = glm_moe_dsa.config(hf_model("full").config.to_dict(), mtp_layers=1)
    params = models.init_params(cfg, jax.random.key(0))
    tensors = table_lib.to_tensors(glm_moe_dsa.table(cfg), params)
    assert "model.layers.3.eh_proj.weight" in tensors and "model.layers.3.mlp.experts.3.up_proj.weight" in tensors
    back = table_lib.to_params(glm_moe_dsa.table(cfg), tensors)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    tokens = rows([[T], [11, 9]])
    hidden, _ = jax.jit(lambda p: vlm.mtp_hidden(cfg, p, vlm.apply(cfg, p, None, tokens), tokens))(params)
    assert [h.shape for h in hidden] == [(2, T, 32)] and np.isfinite(hidden[0]).all()


def test_released_size():
    """743 B as the report counts it: 78 layers, without the MTP layer; 754 B with it (layer 78 of the checkpoint)."""
    hf = transformers.GlmMoeDsaConfig().to_dict()
    cfg = glm_moe_dsa.config(hf)
    assert cfg.decoder == dataclasses.replace(models.glm5.GLM5Config(), rope_theta=hf["rope_parameters"]["rope_theta"])
    assert round(models.count(cfg) / 1e9, 1) == 743.9
    assert models.count(dataclasses.replace(cfg, mtp=MTPConfig(cfg.decoder))) > models.count(cfg)


def test_foreign_config_is_refused():
    hf = hf_model("full").config.to_dict()
    for change, word in (
        ({"model_type": "deepseek_v3"}, "glm_moe_dsa"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, "mlp_layer_types"),
    ):
        with pytest.raises(UserError, match=word):
            glm_moe_dsa.config(hf | change)
