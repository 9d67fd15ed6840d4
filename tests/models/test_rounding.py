"""Parameters rounded beforehand give the numbers that those in float32 give, to the bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.models import vlm
from glmv_jax.models.glm5 import GLM5Config
from glmv_jax.models.rounding import rounded, used
from glmv_jax.trees import flatten
from tests.models.test_vlm import DECODER, config, image_rows
from tests.random_params import random_params

SPARSE = GLM5Config(
    vocab=64, depth=3, width=32, heads=4, mlp=64, dense=1, expert_mlp=16, experts=4, chosen=2, q_rank=16, kv_rank=16,
    nope_dim=8, rope_dim=8, v_dim=8, rope_split=(1, 1, 2), index_heads=2, index_dim=16, top_k=4, dtype="bfloat16",
)  # fmt: skip


def narrow(decoder) -> vlm.VLMConfig:
    cfg = config()
    bf16 = lambda part: dataclasses.replace(part, dtype="bfloat16")  # noqa: E731
    return dataclasses.replace(cfg, vision=bf16(cfg.vision), merger=bf16(cfg.merger), decoder=decoder, mtp=None)


def outputs(cfg, params) -> list:
    vision, tokens = image_rows(np.random.default_rng(1))
    out = vlm.apply(cfg, params, vlm.encode_images(cfg, params, vision)[:1], tokens)
    return [out.hidden, vlm.logits(cfg, params, out.hidden)]


WIDE = {"embedding", "bias", "router", "router_bias"}  # used in float32, or in both
INDEXER = {f"decoder/blocks{i}/layer0/attention/indexer/{name}" for i in (0, 1) for name in ("k_norm/scale",
           "weights/kernel")}  # fmt: skip


@pytest.mark.parametrize(
    "decoder, others",
    [(dataclasses.replace(DECODER, dtype="bfloat16"), set()), (SPARSE, INDEXER)], ids=["dense", "sparse"],
)  # fmt: skip
def test_rounded_parameters_give_the_same_numbers(decoder, others):
    """All matrices are rounded, those of experts too, but what the indexer weighs its heads with and the router."""
    cfg = narrow(decoder)
    params = random_params(cfg)
    fewer = jax.jit(rounded, static_argnums=0)(cfg, params)
    wide = {path for path, x in flatten(fewer).items() if x.dtype != jnp.bfloat16}
    assert {path for path in wide if path.rsplit("/", 1)[1] not in WIDE} == others | {"merger/norm/scale"}
    jax.tree.map(np.testing.assert_array_equal, *(outputs(cfg, p) for p in (params, fewer)))


def test_what_computes_in_float32_stays():
    params = random_params(config())
    assert rounded(config(), params) is params
    assert {x.name for x in jax.tree.leaves(used(config()))} == {"float32"}
