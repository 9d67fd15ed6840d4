"""The running average of parameters against float64 NumPy, and what it leaves out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glmv_jax import optim
from glmv_jax.typing import UserError
from tests.optim.test_groups import config, make_params


def test_average_equals_float64_and_leaves_the_updates_alone():
    groups = [("vision/.*", dict(kind="frozen")), (".*", dict(kind="adamw"))]
    params, plain = make_params(), make_params()
    tx, other = (optim.build(config(groups, ema=decay), params, 10) for decay in (0.9, 0.0))
    state, other_state = tx.init(params), other.init(plain)
    want = np.array(params["head"]["kernel"], np.float64)
    for step in range(4):
        grads = jax.tree.map(lambda p, s=step: jnp.sin(p + s), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, other_state = other.update(grads, other_state, plain)
        plain = optax.apply_updates(plain, updates)
        want = 0.9 * want + 0.1 * np.array(params["head"]["kernel"], np.float64)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    average = optim.averaged(state, params)
    np.testing.assert_allclose(average["head"]["kernel"], want, rtol=1e-6)
    assert np.abs(want - np.asarray(params["head"]["kernel"])).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, average["vision"], params["vision"])
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert not any(x.shape in shapes for x in jax.tree.leaves(params["vision"]))  # nothing is kept of what is frozen


def test_no_average_and_no_decay():
    params = make_params()
    tx = optim.build(config([(".*", dict(kind="adamw"))]), params, 10)
    with pytest.raises(UserError, match="keeps no average"):
        optim.averaged(tx.init(params), params)
    with pytest.raises(UserError, match="ema=1.5 is no decay"):
        optim.build(config([(".*", dict(kind="adamw"))], ema=1.5), params, 10)


def test_what_is_frozen_by_the_run_has_no_state_and_its_group_may_go_unused():
    groups = [("vision/.*/kernel", dict(kind="muon")), ("vision/.*", dict(kind="adamw")), (".*", dict(kind="adamw"))]
    params = make_params()
    cfg = config(groups, freeze=("vision/.*",))
    assert not any(jax.tree.leaves(optim.trainable(cfg, params)["vision"]))
    assert all(jax.tree.leaves(optim.trainable(cfg, params)["head"]))
    state = optim.build(cfg, params, 10).init(params)
    assert sorted({leaf.shape for leaf in jax.tree.leaves(state)}) == [(), (3,), (4, 3)]
    misspelt, twice = (("vison/.*",), "'vison/.*' matches no parameter"), (("head/.*", "head/bias"), "never used")
    for freeze, message in (misspelt, twice):
        with pytest.raises(UserError, match=message):
            optim.trainable(config(groups, freeze=freeze), params)
    with pytest.raises(UserError, match="is never used"):  # of the groups themselves this is still a mistake
        optim.trainable(config([("vision/.*", dict(kind="frozen")), *groups]), params)
