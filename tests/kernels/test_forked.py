"""The TPU's kernels for rows whose segments fork, in the interpreter, against their plain twin. What a chip does with
them is not covered."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import attention as lib
from glmv_jax.kernels import forked, splash
from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.parallel import context
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.rules import preset, use

INTERPRETED = functools.partial(forked.forked, interpret=True)
T = 256


def inputs(K: int = 32, heads: int = 4, groups: int = 2):
    """Two prompts, one with two answers and one with three, and padding; and a row that is one prompt."""
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.normal(size=(2, T, n, K)), jnp.float32)  # noqa: E731
    segments, branches = np.ones((2, T), np.int32), np.zeros((2, T), np.int32)
    segments[0, 90:], segments[0, 230:] = 2, 0
    for start, end, branch in ((30, 70, 1), (70, 90, 2), (150, 170, 1), (170, 171, 2), (171, 230, 3)):
        branches[0, start:end] = branch
    slots = jnp.broadcast_to(jnp.arange(T), (2, T))
    return *map(draw, (heads, groups, groups, heads)), Span(*map(jnp.asarray, (segments, slots, branches)), IN_ORDER)


def with_gradients(path, q, k, v, weight, where: Span):
    out, pull = jax.vjp(lambda q, k, v: path(q, k, v, where, where), q, k, v)
    return out, *pull(weight)


def assert_close(got, want):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}, {"context": 2}])
def test_is_its_twin_forward_and_backward(axes):
    """Over several blocks; each device its rows and heads, or its queries, which lie in the devices' order."""
    q, k, v, weight, whole = inputs()
    want = jax.jit(functools.partial(with_gradients, lib.plain))(q, k, v, weight, whole)
    if not axes:
        return assert_close(with_gradients(INTERPRETED, q, k, v, weight, whole), want)
    mesh = make_mesh(axes, jax.devices()[: 2 * len(axes)])
    with use(mesh, preset("tensor" if "tensor" in axes else "context")):
        deal = lambda x: x[:, context.order(T)]  # noqa: E731
        assert forked._divides(q, k)
        got = jax.jit(functools.partial(with_gradients, INTERPRETED))(
            *map(deal, (q, k, v, weight)), jax.tree.map(deal, whole)
        )
        want = [deal(x) for x in want]
    assert_close(got, want)


def test_is_taken_where_it_can_be(monkeypatch):
    q, k, v, _, where = inputs(128)
    assert not forked.supported(q, k, where, where), "no TPU"
    monkeypatch.setattr(splash.rules, "device", lambda: type("Chip", (), {"platform": "tpu"}))
    assert forked.supported(q, k, where, where)
    assert not forked.supported(q[..., :64], k[..., :64], where, where), "narrow heads"
    assert not forked.supported(q[:, :1], k, where, where), "a step of decoding"
    assert not forked.supported(q, k, where._replace(in_order=None), where), "keys of which nothing is known"
    assert not forked.supported(q, k, where._replace(branches=None), where), "splash does these"
    with use(make_mesh({"tensor": 4}, jax.devices()[:4]), preset("tensor")):
        assert not forked.supported(q, k, where, where), "2 heads of keys over 4 devices"
    with use(make_mesh({"context": 2}, jax.devices()[:2]), preset("context")):  # a device has two chunks
        assert not forked.supported(q, k, where, where), "chunks of 64"
        assert forked.supported(*(jnp.tile(x, (1, 2, 1, 1)) for x in (q, k)), where, where)
    monkeypatch.setattr(forked, "forked", lambda *_: "taken")
    assert lib.attention(q, k, v, where, where) == "taken"
