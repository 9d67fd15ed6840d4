"""Names of parts, from paths as JAX and Flax write them."""

from __future__ import annotations

import pytest

from glmv_jax.parallel.scopes import part


@pytest.mark.parametrize(
    ("scope", "name", "way"),
    [
        ("jit(_step)/jvp(CogViT)/while/body/blocks/attention/q/dot_general", "CogViT/attention/q", "forward"),
        ("jit(_step)/transpose(jvp(Decoder))/Decoder.layers/while/body/checkpoint/blocks1/mlp/blocks1.mlp/up/mul",
         "Decoder/mlp/up", "backward"),
        ("jit(_step)/transpose(jvp(CogViT))/while/body/checkpoint/rematted_computation/blocks/mlp/add",
         "CogViT/mlp", "recomputed"),
        ("jit(_step)/jvp(jit(take_along_axis))/gather", "no name", "forward"),
        ("jit(_step)/update/shard_map/dot_general", "update", ""),
        ("jit(_step)/jvp(CogViT)/attention/reshape;blocks/mlp/reshape", "CogViT/attention", "forward"),
        ("jit(_step)/jvp(Runs)/Runs.layers/while/body/blocks1/layer0/mlp/moe/experts/products/jit(_product)/while/dot",
         "Runs/moe/experts/products", "forward"),
        ("jit(_step)/transpose(jvp(mtp))/MTPLayer/block/attention/block.attention/qkv/q/dot_general",
         "mtp/MTPLayer/attention/qkv", "backward"),
        ("jit(_step)/jvp(Decoder)/cond/branch_1_fun/blocks_3/mlp/add", "Decoder/mlp", "forward"),
        ("jit(_step)/(transpose(jvp(loss))/reduce_sum:transpose(jvp(head))/dot_general)", "loss", "backward"),
        ("jit(_step)/jvp(head)/nv,dv->nd/dot_general", "head", "forward"),  # of an einsum
        ("", "no name", ""),
    ],
)  # fmt: skip
def test_part(scope, name, way):
    assert part(scope) == (name, way)
