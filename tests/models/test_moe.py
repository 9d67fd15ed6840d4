"""The mixture of experts against float64 NumPy and against experts that multiply every token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from glmv_jax.models import moe
from glmv_jax.optim import balance

CFG = moe.MoEConfig(width=8, hidden=6, experts=12, chosen=3, shared=1, groups=4, chosen_groups=2, scale=2.5)


def setup(cfg=CFG, shape=(3, 10)):
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(*shape, cfg.width)), jnp.float32)
    valid = jnp.array(rng.random(shape) < 0.8)
    layer = moe.MoE(cfg)
    params = meta.unbox(layer.init(jax.random.key(0), x, valid)["params"])
    params["router_bias"] = jnp.array(0.3 * rng.normal(size=cfg.experts), jnp.float32)
    return layer, params, x, valid


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(cfg, params, x, valid):
    """(output, load, balance) in float64, a token at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    mlp = lambda v, g, u, d: (silu(v @ g) * (v @ u)) @ d  # noqa: E731
    out, load, terms = np.zeros_like(x), np.zeros(cfg.experts), []
    for b in range(x.shape[0]):
        share, mean, count = np.zeros(cfg.experts), np.zeros(cfg.experts), int(valid[b].sum())
        for t in range(x.shape[1]):
            v = x[b, t]
            out[b, t] = mlp(v, *(p["shared"][n]["kernel"] for n in ("gate", "up", "down")))
            if not valid[b, t]:
                continue
            score = 1 / (1 + np.exp(-(v @ p["router"])))
            choice = score + p["router_bias"]
            size = cfg.experts // cfg.groups
            best = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(cfg.groups)]
            allowed = np.argsort(best)[-cfg.chosen_groups :]
            choice = np.where(np.isin(np.arange(cfg.experts) // size, allowed), choice, -np.inf)
            chosen = np.argsort(choice)[-cfg.chosen :]
            for e in chosen:
                weight = cfg.scale * score[e] / score[chosen].sum()
                out[b, t] += weight * mlp(v, p["gate"][e], p["up"][e], p["down"][e])
            load[chosen] += 1
            share[chosen] += 1 / count
            mean += score / score.sum() / count
        terms.append((share * mean).sum() * cfg.experts / cfg.chosen)
    return out, load, np.mean(terms)


@pytest.mark.parametrize("dense", [False, True])
def test_equals_numpy(dense):
    _, params, x, valid = setup()
    got, aux = moe.MoE(dataclasses.replace(CFG, dense=dense)).apply({"params": params}, x, valid)
    want, load, loss = by_hand(CFG, params, x, valid)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(aux["load"], load)
    np.testing.assert_allclose(aux["balance"], loss, rtol=1e-5)


def test_gradients_equal_those_of_dense_experts():
    layer, params, x, valid = setup()
    weight = jnp.array(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def grads(layer):
        def loss(params, x):
            out, aux = layer.apply({"params": params}, x, valid)
            return (out * weight).sum() + aux["balance"]

        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    for a, b in zip(*(jax.tree.leaves(grads(moe.MoE(dataclasses.replace(CFG, dense=d)))) for d in (False, True))):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.any(grads(layer)[0]["router_bias"])


def test_even_scores_have_balance_one():
    routing = moe.Routing(
        jnp.arange(24).reshape(1, 8, 3) % 12, jnp.ones((1, 8, 3)), jnp.full((1, 8, 12), 0.5)
    )  # each expert chosen twice
    np.testing.assert_allclose(moe.balance(CFG, routing, jnp.ones((1, 8), bool)), 1, rtol=1e-6)


def test_bias_follows_the_load_until_it_is_even():
    """A router that prefers a few experts: without the bias's steps they keep nearly all tokens."""
    cfg = dataclasses.replace(CFG, groups=1, chosen_groups=1)
    layer, params, _, _ = setup(cfg)
    x = jnp.array(np.random.default_rng(2).normal(size=(4, 64, 8)) + 1.0, jnp.float32)
    valid = jnp.ones(x.shape[:2], bool)
    load = jax.jit(lambda p: layer.apply({"params": p}, x, valid)[1]["load"])
    before = balance.imbalance(load(params))
    for _ in range(300):
        params = balance.rebalanced(params, {"router_bias": load(params)}, 0.005)
    after = balance.imbalance(load(params))
    assert before > 0.8 and after < 0.15, (before, after)


def test_a_load_without_its_bias_is_a_bug():
    with pytest.raises(ValueError, match="b/router_bias, which is no parameter"):
        balance.rebalanced({"a": {"router_bias": jnp.zeros(3)}}, {"b/router_bias": jnp.ones(3)}, 0.1)
