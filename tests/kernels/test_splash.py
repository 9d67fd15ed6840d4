"""The TPU's attention kernels, in the interpreter, against their plain twin. What a chip does with them is not covered;
that they compile for one is tests/aot's."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import attention as lib
from glmv_jax.kernels import splash
from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.models import mtp, vlm
from glmv_jax.parallel import context
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.rules import preset, use
from glmv_jax.typing import TokenInput, VisionInput
from tests import tiny_vlm

INTERPRETED = functools.partial(splash.splash, interpret=True)
DEEP = ("vision", "decoder")


def inputs(T: int, K: int = 64, rows: int = 2, heads: int = 4, groups: int = 2):
    rng = np.random.default_rng(T)
    draw = lambda n: jnp.asarray(rng.normal(size=(rows, T, n, K)), jnp.float32)  # noqa: E731
    return draw(heads), draw(groups), draw(groups), draw(heads)


def span(T: int, causal: bool, rows: int = 2) -> Span:
    """One row of two segments and padding, the others one segment."""
    segments = np.ones((rows, T), np.int32)
    segments[0, T // 3 :] = 2
    segments[0, T - T // 5 :] = 0
    slots = jnp.broadcast_to(jnp.arange(T), (rows, T)) if causal else None
    return Span(jnp.asarray(segments), slots, in_order=IN_ORDER)


def with_gradients(path, q, k, v, weight, where: Span):
    out, pull = jax.vjp(lambda q, k, v: path(q, k, v, where, where), q, k, v)
    return out, *pull(weight)


def assert_close(got, want):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "K"), [(256, 64), (200, 128), (640, 16)])
def test_is_its_twin_forward_and_backward(causal, T, K):
    """Several blocks, and rows that do not fill the last one."""
    args = *inputs(T, K), span(T, causal)
    assert_close(with_gradients(INTERPRETED, *args), with_gradients(lib.plain, *args))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"data": 2, "context": 2}])
def test_over_a_mesh(causal, axes):
    """Each device its rows and heads; or its queries, which lie in the devices' order."""
    T = 512
    q, k, v, weight = inputs(T)
    whole = span(T, causal)
    want = with_gradients(lib.plain, q, k, v, weight, whole)
    with use(make_mesh(axes, jax.devices()[:4]), preset("tensor" if "tensor" in axes else "context")):
        order = context.order(T)
        deal = lambda x: x[:, order]  # noqa: E731
        where = jax.tree.map(deal, whole)
        assert splash._divides(q, k)
        got = jax.jit(functools.partial(with_gradients, INTERPRETED))(*map(deal, (q, k, v, weight)), where)
    assert_close(got, map(deal, want))


def test_is_taken_where_it_can_be(monkeypatch):
    q, k, v, _ = inputs(256)
    where = span(256, True)
    assert not splash.supported(q, k, where, where), "no TPU"
    monkeypatch.setattr(splash.rules, "device", lambda: type("Chip", (), {"platform": "tpu"}))
    assert splash.supported(q, k, where, where)
    assert not splash.supported(q[:, :1], k, where, where), "a step of decoding"
    assert not splash.supported(q[:, :128], k[:, :128], where, where), "a short row"
    assert not splash.supported(q, k, where, where._replace(in_order=None)), "keys of which nothing is known"
    forks = where._replace(branches=where.segments)
    assert not splash.supported(q, k, forks, forks)
    with use(make_mesh({"context": 3}, jax.devices()[:3]), preset("context")):
        assert not splash._divides(*(jnp.zeros((1, 1152, 4, 64)),) * 2), "chunks of 192"
        assert splash._divides(*(jnp.zeros((1, 2304, 4, 64)),) * 2)
    with use(make_mesh({"tensor": 4}, jax.devices()[:4]), preset("tensor")):
        assert not splash.supported(q, k, where, where), "2 heads of keys over 4 devices"
    monkeypatch.setattr(splash, "splash", lambda *_: "taken")
    assert lib.attention(q, k, v, where, where) == "taken"


def test_what_models_promise(monkeypatch):
    """A whole VLM with an MTP head, of rows with segments, images and padding, is the same through these kernels where
    rows are split: each device runs them on its own queries, of which it has two chunks, and all keys of the row."""
    cfg, T = dataclasses.replace(tiny_vlm.config(), mtp=mtp.MTPConfig(tiny_vlm.config().decoder, depth=1)), 512
    cfg = dataclasses.replace(cfg, **{part: dataclasses.replace(getattr(cfg, part), depth=1) for part in DEEP})
    params = tiny_vlm.params(cfg)
    rng = np.random.default_rng(0)
    batch = tiny_vlm.prompt_batch([tiny_vlm.prompt(rng, 300, (9, 7)), tiny_vlm.prompt(rng, 490, (2, 3))], T, T)
    batch["segments"][1, 150:420] = 2
    vision = VisionInput(*(jnp.asarray(batch[k]) for k in ("patches", "yx", "frame")))
    tokens = TokenInput(*(jnp.asarray(batch[k]) for k in ("tokens", "positions", "segments", "image_row")))
    far = rng.normal(size=(2, 2, T, tiny_vlm.WIDTH)).astype(np.float32)

    def loss(params):
        out = vlm.apply(cfg, params, vision, tokens)
        (ahead,), _ = vlm.mtp_hidden(cfg, params, out, tokens)
        return sum(((x - context.dealt(y)) ** 2).mean() for x, y in zip((out.hidden, ahead), far))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    taken = []

    def forced(q, k, v, query, key):
        taken.append(query.slots is not None)
        return INTERPRETED(q, k, v, query, key)

    monkeypatch.setattr(splash, "supported", lambda q, k, query, key: None not in (query.in_order, key.in_order))
    monkeypatch.setattr(splash, "splash", forced)
    with use(make_mesh({"context": 2}, jax.devices()[:2]), preset("context")):
        got, got_grads = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    assert set(taken) == {False, True} and len(taken) >= 3, "encoder, decoder, MTP head"
    np.testing.assert_allclose(got, value, rtol=1e-5)
    largest = max(float(jnp.linalg.norm(g)) for g in jax.tree.leaves(grads))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got_grads), jax.tree.leaves(grads)):
        error, norm = float(jnp.linalg.norm(a - b)), float(jnp.linalg.norm(b))
        assert error <= 1e-4 * norm + 1e-7 * largest, (jax.tree_util.keystr(path), error, norm)


def test_a_fresh_prefill_is_a_row_that_sees_itself(monkeypatch):
    """Prompts of two lengths through these kernels: states and cache are those of a pass that reads its cache."""
    cfg = tiny_vlm.config()
    params, rng = tiny_vlm.params(cfg), np.random.default_rng(0)
    batch = tiny_vlm.prompt_batch([tiny_vlm.prompt(rng, 12, None), tiny_vlm.prompt(rng, 20, None)], 24, 4)
    tokens = TokenInput(*(jnp.asarray(batch[k]) for k in ("tokens", "positions", "segments", "image_row")))
    run = lambda slots, fresh: vlm.apply(cfg, params, None, tokens, vlm.init_cache(cfg, 2, slots), fresh)  # noqa: E731
    want = jax.jit(lambda: run(24, False))()
    taken = []
    monkeypatch.setattr(splash, "supported", lambda q, k, query, key: None not in (query.in_order, key.in_order))
    monkeypatch.setattr(splash, "splash", lambda *args: taken.append(args) or INTERPRETED(*args))
    got = jax.jit(lambda: run(24, True))()
    assert taken
    for a, b in zip(jax.tree.leaves((got.hidden, got.cache)), jax.tree.leaves((want.hidden, want.cache)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))
    taken.clear()
    jax.eval_shape(lambda: run(40, True))
    assert not taken, "slots that nobody fills"


@pytest.mark.parametrize("option", ["masked", "image_token"])
def test_mtp_without_keys_of_images_is_left_alone(option, monkeypatch):
    """With "masked" a row's first image sees nothing; the kernels want each position to see itself."""
    cfg = dataclasses.replace(tiny_vlm.config(), mtp=mtp.MTPConfig(tiny_vlm.config().decoder, 1, option))
    batch = tiny_vlm.prompt_batch([tiny_vlm.prompt(np.random.default_rng(0), 4, (1, 1))], 8, 4)
    tokens = TokenInput(*(jnp.asarray(batch[k]) for k in ("tokens", "positions", "segments", "image_row")))
    params, asked = tiny_vlm.params(cfg), []
    monkeypatch.setattr(splash, "supported", lambda q, k, *spans: asked.append([span.in_order for span in spans]))
    x_BTD = jnp.zeros((1, 8, tiny_vlm.WIDTH))
    out = vlm.VLMOutput(x_BTD, x_BTD, x_BTD, None, {})
    jax.eval_shape(lambda params: vlm.mtp_hidden(cfg, params, out, tokens)[0], params)
    assert {mark for spans in asked for mark in spans} == {None if option == "masked" else IN_ORDER}
