"""Stage 2 at its published size: vision, text, projection and scalars each follow a schedule of their own."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from glmv_jax import config, optim
from glmv_jax.typing import UserError

STEPS = 100
MODULES = ("vision", "text", "projection", "scalars")


def parameters():
    """One leaf for each kind of parameter that the experiment's expressions speak of."""
    matrix, vector = jnp.ones((1, 4, 6)), jnp.ones(6)
    tower = {"blocks": {"q": {"kernel": matrix}}, "norm": {"scale": vector}}
    head = {"projection": {"kernel": jnp.ones((4, 6))}}
    return {"vision": tower, "text": tower | {"embed": {"embedding": jnp.ones((5, 6))}}, "image_head": head,
            "text_head": head, "scale": {"bias": jnp.ones(())}}  # fmt: skip


def by_hand(t, peak, warmup, decay, final):
    """float64, apart from the package."""
    if t < warmup:
        return peak * (t + 1) / (warmup + 1)
    u = (t - warmup) / (STEPS - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * u)) / 2, "linear": 1 - u, "constant": 1.0}[decay]
    return peak * (shape if decay == "constant" else final + (1 - final) * shape)


WANT = {
    "vision": dict(peak=0.5e-3, warmup=5, decay="cosine", final=0.0),
    "text": dict(peak=1e-3, warmup=2, decay="cosine", final=0.1),
    "projection": dict(peak=0.15e-3, warmup=2, decay="linear", final=0.0),
    "scalars": dict(peak=1e-3, warmup=2, decay="constant", final=1.0),
}


@pytest.fixture(scope="module")
def cfg():
    return config.load("experiments/cogvit_siglip.py:size=l").optim


def test_logged_rates(cfg):
    rates = optim.learning_rates(cfg, STEPS)
    for t in (0, 2, 30, 70, 99):
        for name in MODULES:
            assert rates(t)[f"lr/{name}"] == pytest.approx(by_hand(t, **WANT[name])), (name, t)
    late = {name: by_hand(90, **WANT[name]) / WANT[name]["peak"] for name in MODULES}
    assert sorted(late, key=late.get) == ["vision", "projection", "text", "scalars"]


def test_updates_follow_the_rates(cfg):
    """Under one gradient that never changes an update is as large as its rate: early, late, and between them."""
    params = parameters()
    tx = optim.build(cfg, params, STEPS)
    state, grad = tx.init(params), jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), params)
    step = jax.jit(tx.update)
    sizes = []
    for _ in range(STEPS):
        updates, state = step(grad, state, params)
        size = lambda x: float(jnp.abs(x).max())  # noqa: E731
        sizes.append({"vision": size(updates["vision"]["blocks"]["q"]["kernel"]),
                      "text": size(updates["text"]["blocks"]["q"]["kernel"]),
                      "projection": size(updates["image_head"]["projection"]["kernel"]),
                      "scalars": size(updates["scale"]["bias"])})  # fmt: skip
    for name in MODULES:
        for t in (0, 1, 3, 50, 95):
            want = by_hand(t, **WANT[name]) / by_hand(20, **WANT[name])
            assert sizes[t][name] / sizes[20][name] == pytest.approx(want, rel=0.02), (name, t)


def test_nano_has_one_schedule_and_logs_one_rate():
    cfg = config.load("experiments/cogvit_siglip.py:size=nano").optim
    assert set(optim.learning_rates(cfg, 300)(10)) == {"lr"}
    assert not [settings for _, settings in cfg.groups if "schedule" in settings]


def test_names_are_given_once():
    groups = [("a", {"kind": "adamw", "name": "x"}), (".*", {"kind": "adamw", "name": "x"})]
    with pytest.raises(UserError, match="another one is called 'x' too"):
        optim.learning_rates({"lr": 1.0, "groups": groups}, 10)
