"""Parity with transformers' GLM-4.5V and GLM-4.6V (glm4v_moe), randomly initialised, float32: logits with padding,
packing, images, videos and a cache, gradients of every parameter, groups of experts; and the QK-norm of GLM-4.5.

Not covered: the released weights (none can be fetched here), bfloat16. The tower is the one of test_glm4v.py.
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
from glmv_jax.interop import glm4v_moe  # noqa: E402
from glmv_jax.interop import table as table_lib  # noqa: E402
from glmv_jax.kernels.span import Span  # noqa: E402
from glmv_jax.models import decoder, vlm  # noqa: E402
from glmv_jax.models.mtp import MTPConfig  # noqa: E402
from glmv_jax.trees import flatten  # noqa: E402
from glmv_jax.typing import TokenInput, UserError  # noqa: E402
from tests.interop import glm4v_oracle as oracle  # noqa: E402

EXPERTS = dict(
    moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, first_k_dense_replace=1,
    routed_scaling_factor=1.5,
)  # fmt: skip


@functools.cache
def pair(**text) -> oracle.Pair:
    hf = transformers.Glm4vMoeConfig(
        text_config=oracle.TEXT | EXPERTS | text, vision_config=dict(oracle.VISION), **oracle.TOKENS)  # fmt: skip
    return oracle.pair(transformers.Glm4vMoeForConditionalGeneration(hf), glm4v_moe)


def test_tower():
    oracle.check_tower(pair(), [(1, 4, 6), (2, 2, 8)])


@pytest.mark.parametrize("text", [
    {},
    dict(n_group=4, topk_group=2, num_experts_per_tok=2),
    dict(first_k_dense_replace=0, norm_topk_prob=False),
    dict(first_k_dense_replace=3, attention_bias=False),  # no layer has experts
], ids=["plain", "groups", "experts in all layers", "in none"])  # fmt: skip
def test_images_in_padded_rows(text):
    p = pair(**text)
    oracle.check_rows(p, oracle.IMAGES)
    oracle.check_way_back(p)


def test_videos_in_padded_rows():
    oracle.check_rows(pair(), oracle.VIDEOS, video=True)


def test_packed_rows_are_texts_alone():
    oracle.check_packing(pair())


def test_decoding_with_a_cache():
    oracle.check_decoding(pair())


def test_gradients_of_all_parameters():
    oracle.check_gradients(pair(), oracle.IMAGES)


def test_continuations_of_a_shared_prompt():
    """Two answers to each of three prompts, whose keys are not copied, against transformers on the whole texts."""
    p, steps, prompts = pair(), 3, oracle.IMAGES
    answers = np.random.default_rng(0).integers(1, oracle.WORDS, (6, steps))
    cache = vlm.init_cache(p.cfg, 3, oracle.T)
    cache = oracle.run(p.cfg, p.params, *oracle.batch([[s] for s in prompts]), cache)[1].cache
    lengths = jnp.array([len(s.tokens) for s in prompts])
    cache = vlm.share_prompts(p.cfg, cache | {"length": lengths}, 2, steps)
    following = np.array([s.positions().max() + 1 for s in prompts]).repeat(2)
    ones, got = jnp.ones((6, 1), jnp.int32), []
    for i in range(steps):
        positions = jnp.broadcast_to(jnp.array(following + i)[:, None, None], (6, 1, 3))
        one = TokenInput(jnp.array(answers[:, i : i + 1]), positions, ones, -ones)
        logits, out = oracle.run(p.cfg, p.params, None, one, cache)
        cache = out.cache
        got.append(np.asarray(logits)[:, 0])
    for n, answer in enumerate(answers):
        s = prompts[n // 2]
        whole = s._replace(tokens=np.append(s.tokens, answer), frame=np.append(s.frame, [-1] * steps))
        oracle.close(np.stack(got)[:, n], oracle.theirs(p.model, [whole])[0][-steps:])


def test_loads_are_counted_layer_by_layer():
    """Every valid token is counted once for each expert it chose, in the experts that transformers' router chose."""
    p, chosen = pair(), []
    layers = p.model.model.language_model.layers[1:]
    hooks = [x.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2].numpy())) for x in layers]
    for s in oracle.IMAGES:
        oracle.theirs(p.model, [s])
    for hook in hooks:
        hook.remove()
    aux = oracle.run(p.cfg, p.params, *oracle.batch([[s] for s in oracle.IMAGES]))[1].aux
    assert aux.keys() == {"blocks0", "blocks1"} and not aux["blocks0"]
    for i in range(2):
        want = np.bincount(np.concatenate([c.reshape(-1) for c in chosen[i::2]]), minlength=8)
        np.testing.assert_array_equal(aux["blocks1"]["load"][i], want)


def test_the_qk_norm_of_glm_4_5():
    """The text model alone (transformers `glm4_moe`): the same decoder, its tensors without `language_model.`."""
    hf = transformers.Glm4MoeConfig(**oracle.TEXT | EXPERTS | dict(use_qk_norm=True, attention_bias=True, head_dim=16))
    model = transformers.Glm4MoeForCausalLM(hf).eval()
    oracle.randomise(model)
    text = hf.to_dict()
    cfg = glm4v_moe.text(text, tied=False)
    assert cfg.qk_norm
    tensors = {name.replace("model.", "model.language_model."): x for name, x in oracle.written(model).items()}
    params = table_lib.to_params(glm4v_moe.decoder(cfg), tensors)["decoder"]
    ids = np.random.default_rng(0).integers(1, oracle.WORDS, (2, 11))
    span = Span(jnp.ones((2, 11), int), jnp.broadcast_to(jnp.arange(11), (2, 11)))
    positions = jnp.broadcast_to(jnp.arange(11)[None, :, None], (2, 11, 3))

    @jax.jit
    def logits(params):
        out = decoder.apply(cfg, params, decoder.embed(params, jnp.array(ids)), positions, span, span)
        return decoder.logits(cfg, params, out.hidden)

    with torch.no_grad():
        oracle.close(logits(params), model(torch.tensor(ids)).logits)


def test_an_mtp_layer_has_a_name_for_everything():
    p, rng = pair(), np.random.default_rng(0)
    cfg = dataclasses.replace(p.cfg, mtp=MTPConfig(p.cfg.decoder))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), models.abstract_params(cfg))
    tensors = table_lib.to_tensors(glm4v_moe.table(cfg), params)
    assert "model.language_model.layers.3.mlp.experts.7.down_proj.weight" in tensors
    again = flatten(table_lib.to_params(glm4v_moe.table(cfg), tensors, glm4v_moe.duplicates(cfg)))
    for name, x in flatten(params).items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)
    assert glm4v_moe.config(p.model.config.to_dict(), mtp_layers=1) == cfg


def test_size_of_the_released_model():
    """transformers' default config, on its meta device; the bias of the router is a buffer there."""
    rope = dict(rope_theta=1e4, rope_type="default", mrope_section=[8, 12, 12], partial_rotary_factor=0.5)
    hf = transformers.Glm4vMoeConfig(text_config={"rope_parameters": rope, "head_dim": 128})
    with torch.device("meta"):
        model = transformers.Glm4vMoeForConditionalGeneration(hf)
    biases = [x for name, x in model.named_buffers() if name.endswith("e_score_correction_bias")]
    want = sum(x.numel() for x in [*model.parameters(), *biases])
    assert models.count(glm4v_moe.config(hf.to_dict())) == want


def test_what_is_not_of_the_family_is_named():
    hf = pair().model.config.to_dict()
    with pytest.raises(UserError, match="model_type 'glm4v' is not glm4v_moe"):
        glm4v_moe.config(hf | {"model_type": "glm4v"})
    with pytest.raises(UserError, match="has no QK-norm"):
        glm4v_moe.config(hf | {"text_config": hf["text_config"] | {"use_qk_norm": True}})
