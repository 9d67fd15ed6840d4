"""Adapters of stacked matrices against float64 loops. Training with them: tests/train/test_tuning.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from glmv_jax.optim.lora import adapter_axes, apply_adapters, init_adapters
from glmv_jax.typing import UserError

CFG = ConfigDict(dict(rank=2, alpha=6.0, targets=(r"decoder/.*/(q|up)/kernel",)))
SHAPES = {
    "decoder": {
        "blocks": {"q": {"kernel": (3, 6, 8)}, "k": {"kernel": (3, 6, 4)}, "experts": {"up": {"kernel": (3, 4, 6, 5)}}},
        "norm": {"scale": (6,)},
    }
}
AXES = {
    "decoder": {
        "blocks": {
            "q": {"kernel": ("layers", "embed", "heads")},
            "k": {"kernel": ("layers", "embed", "kv_heads")},
            "experts": {"up": {"kernel": ("layers", None, "embed", "mlp")}},
        },
        "norm": {"scale": ("norm",)},
    }
}


def base(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), SHAPES, is_leaf=is_shape)


def moved(adapters):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), jnp.float32), adapters)


def test_at_the_start_the_model_is_the_base():
    for dtype in (jnp.float32, jnp.bfloat16):
        adapters = init_adapters(CFG, base(), jax.random.key(0))
        got = apply_adapters(CFG, base(dtype), adapters)
        jax.tree.map(np.testing.assert_array_equal, got, base(dtype))
        assert all(x.dtype == dtype for x in jax.tree.leaves(got))
    a = adapters["lora"]["decoder"]["blocks"]["experts"]["up"]["kernel"]["a"]
    assert a.shape == (3, 4, 6, 2) and len({float(x) for x in a.ravel()}) == a.size


def test_sum_and_gradients_equal_float64_loops():
    params, adapters = base(), moved(init_adapters(CFG, base(), jax.random.key(0)))
    mix = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)

    def loss(adapters):
        model = apply_adapters(CFG, params, adapters)
        return sum((jnp.sin(w) * c).sum() for w, c in zip(jax.tree.leaves(model), jax.tree.leaves(mix), strict=True))

    model, grads = apply_adapters(CFG, params, adapters), jax.grad(loss)(adapters)
    np.testing.assert_array_equal(model["decoder"]["blocks"]["k"]["kernel"], params["decoder"]["blocks"]["k"]["kernel"])
    of = lambda tree: tree["decoder"]["blocks"]  # noqa: E731
    for get in (lambda t: of(t)["q"]["kernel"], lambda t: of(t)["experts"]["up"]["kernel"]):
        w, c, got = (np.asarray(get(t), np.float64) for t in (params, mix, model))
        ab, g = get(adapters["lora"]), get(grads["lora"])
        for at in np.ndindex(w.shape[:-2]):
            a, b = np.asarray(ab["a"][at], np.float64), np.asarray(ab["b"][at], np.float64)
            want = w[at] + 3.0 * a @ b  # alpha / rank
            np.testing.assert_allclose(got[at], want, rtol=1e-5, atol=1e-5)
            slope = np.cos(want) * c[at]
            np.testing.assert_allclose(g["a"][at], 3.0 * slope @ b.T, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(g["b"][at], 3.0 * a.T @ slope, rtol=1e-4, atol=1e-4)


def test_adapters_live_where_their_matrix_does():
    axes = adapter_axes(CFG, base(), AXES)["lora"]["decoder"]["blocks"]
    assert axes["q"]["kernel"] == {"a": ("layers", "embed", None), "b": ("layers", None, "heads")}
    up = axes["experts"]["up"]["kernel"]
    assert up == {"a": ("layers", None, "embed", None), "b": ("layers", None, None, "mlp")}


@pytest.mark.parametrize("regex", ["q/kernel", r"decoder/norm/.*"])
def test_what_matches_no_matrix_is_named(regex):
    cfg = CFG.copy_and_resolve_references()
    cfg.targets = (regex,)
    with pytest.raises(UserError, match="matches no matrix; their whole paths are such as decoder/blocks"):
        init_adapters(cfg, base(), jax.random.key(0))
