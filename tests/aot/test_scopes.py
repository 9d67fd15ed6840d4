"""Names of parts, from paths as JAX and Flax write them."""

from __future__ import annotations

import pytest

from glmv_jax.aot.scopes import part


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
        ("", "no name", ""),
    ],
)  # fmt: skip
def test_part(scope, name, way):
    assert part(scope) == (name, way)
