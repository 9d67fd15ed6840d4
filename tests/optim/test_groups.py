"""Groups by regex: coverage, freezing, and AdamW against torch. Not covered: every combination of options."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from glmv_jax import optim
from glmv_jax.typing import UserError


def make_params(seed: int = 0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "vision": {"blocks": {"q": {"kernel": normal(2, 4, 6), "bias": normal(2, 6)}, "norm": {"scale": normal(2, 4)}}},
        "head": {"kernel": normal(4, 3), "bias": normal(3)},
    }


def config(groups, **kwargs):
    return ConfigDict(dict(lr=0.1, groups=groups, **kwargs))


def run(cfg, params, grads, total_steps=10):
    tx = optim.build(cfg, params, total_steps)
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_first_match_wins_and_every_group_has_its_own_rate_decay_and_schedule():
    cfg = config(
        [
            (".*/norm/scale", dict(kind="adamw", lr_mult=0.0)),
            ("vision/.*/kernel", dict(kind="muon", wd=0.5, schedule=dict(decay="linear"))),
            ("vision/.*", dict(kind="frozen")),
            (".*", dict(kind="adamw", lr_mult=0.1)),
        ]
    )
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    tx = optim.build(cfg, params, 10)
    first, _ = tx.update(grads, tx.init(params), params)

    q = params["vision"]["blocks"]["q"]["kernel"]
    alone = optim.muon(0.1, weight_decay=0.5)
    want, _ = alone.update(jnp.ones_like(q), alone.init(q), q)
    np.testing.assert_allclose(first["vision"]["blocks"]["q"]["kernel"], want, atol=1e-6)
    assert not np.asarray(first["vision"]["blocks"]["q"]["bias"]).any()
    assert not np.asarray(first["vision"]["blocks"]["norm"]["scale"]).any()
    np.testing.assert_allclose(first["head"]["kernel"], -0.01, rtol=1e-5)  # AdamW's first step is lr * sign(grad)

    after, _ = run(cfg, params, [grads] * 10)
    tail, _ = run(cfg, params, [grads] * 11)
    still = jax.tree.map(lambda a, b: bool((a == b).all()), after["vision"], tail["vision"])
    assert still["blocks"]["q"]["kernel"]  # its linear schedule ended at 0
    assert not (after["head"]["kernel"] == tail["head"]["kernel"]).all()  # the constant one did not


def test_frozen_parameters_have_no_state_and_do_not_move_nor_count_in_the_clip():
    cfg = config([("vision/.*", dict(kind="frozen")), (".*", dict(kind="adamw"))], clip=1.0)
    params = make_params()
    tx = optim.build(cfg, params, 10)
    state = tx.init(params)
    assert sorted({leaf.shape for leaf in jax.tree.leaves(state)}) == [(), (3,), (4, 3)]

    grads = jax.tree.map(jnp.ones_like, params)
    for huge in (0.0, 1e6):
        grads["vision"] = jax.tree.map(lambda g, h=huge: jnp.full_like(g, h), params["vision"])
        after, state = run(cfg, params, [grads])
        for old, new in zip(jax.tree.leaves(params["vision"]), jax.tree.leaves(after["vision"]), strict=True):
            assert (old == new).all()
        moment = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4, 3)][0]
        np.testing.assert_allclose(moment, 0.1 / np.sqrt(15), rtol=1e-5)  # 15 trained numbers, clipped to norm 1
    mask = optim.trainable(cfg, params)
    assert not any(jax.tree.leaves(mask["vision"])) and all(jax.tree.leaves(mask["head"]))


def test_build_takes_shapes():
    params = make_params()
    cfg = config([(".*/kernel", dict(kind="muon")), (".*", dict(kind="adamw"))], clip=1.0)
    shapes = jax.eval_shape(lambda: params)
    tx = optim.build(cfg, shapes, 10)
    want = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(optim.build(cfg, params, 10).init, params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, shapes)) == want


@pytest.mark.parametrize("betas, eps", [((0.9, 0.95), 1e-8), ((0.9, 0.999), 1e-6)])
def test_adamw_equals_torch_over_fifty_steps(betas, eps):
    torch = pytest.importorskip("torch")
    params = make_params()
    rng = np.random.default_rng(7)
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(50)]
    cfg = config([(".*", dict(kind="adamw", wd=0.1, betas=betas, eps=eps, decay_vectors=True))])
    got, _ = run(cfg, params, grads, 50)

    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(p))) for p in jax.tree.leaves(params)]
    torch_opt = torch.optim.AdamW(theirs, lr=0.1, betas=betas, eps=eps, weight_decay=0.1)
    for grad in grads:
        for p, g in zip(theirs, jax.tree.leaves(grad), strict=True):
            p.grad = torch.tensor(np.asarray(g))
        torch_opt.step()
    for ours, p in zip(jax.tree.leaves(got), theirs, strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), atol=3e-5)


def test_weight_decay_leaves_vectors_alone_also_when_they_are_stacked():
    params = make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, _ = run(config([(".*", dict(kind="adamw", wd=0.1))]), params, [zeros])
    moved = jax.tree.map(lambda a, b: not bool((a == b).all()), params, after)
    assert moved["vision"]["blocks"] == {"q": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    assert moved["head"] == {"kernel": True, "bias": False}


def test_global_norm_clip():
    params = {"w": jnp.zeros((2, 2))}
    tx = optim.build(config([(".*", dict(kind="adamw"))], clip=0.5), params, 1)
    grads = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    _, state = tx.update(grads, tx.init(params), params)
    moment = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2)][0]
    np.testing.assert_allclose(moment, 0.1 * 0.1 * grads["w"], rtol=1e-5)


@pytest.mark.parametrize(
    "groups, message",
    [
        ([("vision/.*", dict(kind="adamw"))], "no expression matches head/bias, head/kernel; add one"),
        ([("heat/.*", dict(kind="adamw")), (".*", dict(kind="adamw"))], "'heat/.*' matches no parameter.*head/"),
        ([("kernel", dict(kind="muon")), (".*", dict(kind="adamw"))], "must match the whole path, as '.*kernel.*'"),
        ([(".*/.*", dict(kind="adamw")), ("head/.*", dict(kind="frozen"))], "'head/.*' is never used.*move it up"),
        ([(".*", dict(kind="muon"))], "Muon is for matrices, head/bias is a vector"),
        ([("head/kernel", dict(kind="muon", heads=2)), (".*", dict(kind="adamw"))], "columns of head/kernel .*heads=2"),
        ([(".*", dict(kind="lion"))], "kind='lion' is not one of muon, adamw, frozen"),
        ([(".*", dict(kind="adamw", beta=(0.9, 0.9)))], "unknown key 'beta'; nearest: betas"),
        ([(".*", dict(kind="muon", betas=(0.9, 0.9)))], "unknown key 'betas'"),
        ([("(", dict(kind="adamw"))], "is not a regular expression"),
        ([(".*", dict(kind="adamw", schedule=dict(decay="cosin")))], "decay='cosin' is not one of cosine"),
    ],
)
def test_mistakes_are_named(groups, message):
    with pytest.raises(UserError, match=message) as error:
        optim.build(config(groups), make_params(), 10)
    assert "\n" not in str(error.value)


def test_unknown_top_key_names_the_nearest():
    with pytest.raises(UserError, match="unknown key 'clp'; nearest: clip"):
        optim.build(config([(".*", dict(kind="adamw"))], clp=1.0), make_params(), 10)
