"""Cross-entropy some tokens at a time against all logits at once: loss, gradients, what is said, memory, a split head.

Not covered: speed (benchmarks), a head split over its rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.losses.chunked import head_logprobs, head_loss, head_map
from glmv_jax.losses.cross_entropy import cross_entropy, entropy, logprobs
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")


def case(B=8, T=9, D=16, V=96, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    weight = rng.choice([0.0, 0.5, 1.0], (B, T))
    return (*(jnp.array(x, jnp.float32) for x in (hidden, head)), jnp.array(rng.integers(0, V, (B, T))), weight)


def by_chunks(hidden, head, targets, weight, chunk, z=0.0):
    out = head_loss(hidden, head, targets, weight / weight.sum(), chunk=chunk, z_loss=z)
    return out.total, (out.nll_BT, out.said_BT)


def all_at_once(hidden, head, targets, weight, z=0.0):
    logits = hidden @ head
    out = cross_entropy(logits, targets, weight, z_loss=z)
    return out.loss, (out.nll_BT, jnp.argmax(logits, -1))


def close(got, want):
    (got, got_grads), (want, want_grads) = got, want
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1][0], want[1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[1][1], want[1][1])
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [0, 1, 5, 24, 72, 1000])
def test_chunks_equal_all_logits(chunk, z):
    args = case()
    both = dict(argnums=(0, 1), has_aux=True)
    got = jax.jit(jax.value_and_grad(by_chunks, **both), static_argnums=(4, 5))(*args, chunk, z)
    close(got, jax.value_and_grad(all_at_once, **both)(*args, z))


@pytest.mark.parametrize("chunk", [0, 7])
def test_the_gradient_is_that_of_what_the_loss_is_part_of(chunk):
    args = case(seed=1)
    twist = lambda loss: lambda h, w: jnp.sin(3.0 * loss(h, w)[0])  # noqa: E731
    got = jax.grad(twist(lambda h, w: by_chunks(h, w, *args[2:], chunk)), argnums=(0, 1))(*args[:2])
    want = jax.grad(twist(lambda h, w: all_at_once(h, w, *args[2:])), argnums=(0, 1))(*args[:2])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_bfloat16_products_with_float32_sums():
    """The gradient of the head is summed in float32 over chunks: it is no rougher than that of all tokens at once."""
    hidden, head, targets, weight = case(T=64, seed=2)
    half = hidden.astype(jnp.bfloat16)
    grad = lambda chunk: jax.grad(lambda w: by_chunks(half, w, targets, weight, chunk)[0])(head)  # noqa: E731
    exact = jax.grad(lambda w: all_at_once(hidden, w, targets, weight)[0])(head)
    error = lambda x: float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))  # noqa: E731
    assert grad(16).dtype == jnp.float32
    assert error(grad(16)) < 1.05 * error(grad(0)) < 0.02


@pytest.mark.parametrize("sizes", [None, {"data": 2, "tensor": 4}])
@pytest.mark.parametrize("chunk", [0, 5])
def test_logprobs_by_chunks(chunk, sizes):
    """Their gradient is that of any function of them, here one that is no weighted sum; the entropy has none."""
    hidden, head, targets, weight = case(seed=3)

    def score(logprob, ent):
        return (weight * jnp.exp(0.3 * logprob)).sum() + 2.0 * jax.lax.stop_gradient(ent).sum(), (logprob, ent)

    def full(h, w):
        logits = h @ w / 0.7
        return score(logprobs(logits, targets), entropy(logits))

    def few(h, w):
        logprob, ent = head_logprobs(h, w, targets, temperature=0.7, chunk=chunk)
        return (weight * jnp.exp(0.3 * logprob)).sum() + 2.0 * ent.sum(), (logprob, ent)

    both = dict(argnums=(0, 1), has_aux=True)
    want = jax.value_and_grad(full, **both)(hidden, head)
    if sizes is None:
        got = jax.jit(jax.value_and_grad(few, **both))(hidden, head)
    else:
        if jax.device_count() < 8:
            pytest.skip("needs 8 (emulated) devices")
        mesh, rules = mesh_lib.make_mesh(sizes), rules_lib.preset("fsdp_tensor")
        head = jax.device_put(head, rules.shardings(mesh, {"head": ("embed", "vocab")})["head"])
        with rules_lib.use(mesh, rules):
            got = jax.jit(jax.value_and_grad(few, **both))(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [None, {"data": 2, "tensor": 4}])
def test_any_function_of_all_probabilities_by_chunks(sizes):
    """Several results of several shapes, of arrays a token that have no gradient of their own; values and gradients."""
    if sizes and jax.device_count() < 8:
        pytest.skip("needs 8 (emulated) devices")
    hidden, head, targets, weight = case(seed=4)
    ids = jnp.stack([targets, (targets + 7) % 96], -1)

    def fn(logp, ids, weight):
        top, at = jax.lax.top_k(logp, 3)
        return {"some": jnp.take_along_axis(logp, ids, axis=-1), "one": weight * (jnp.exp(logp) ** 2).sum(-1)}, top, at

    def total(apply, h, w):
        found, top, at = apply(h, w)
        twist = jnp.sin(0.1 * found["some"]).sum() + (found["one"] * jnp.arange(9.0)).sum()
        return twist + (top * jnp.arange(3)).sum(), (found, top, at)

    by_chunks = lambda h, w: head_map(fn, h, w, ids, weight, temperature=0.7, chunk=5)  # noqa: E731
    at_once = lambda h, w: fn(jax.nn.log_softmax(h @ w / 0.7), ids, weight)  # noqa: E731
    run = lambda apply: jax.jit(jax.value_and_grad(functools.partial(total, apply), (0, 1), has_aux=True))(hidden, head)  # noqa: E731
    want = run(at_once)
    mesh = mesh_lib.make_mesh(sizes or {"data": 1}, jax.devices()[: 8 if sizes else 1])
    with rules_lib.use(mesh, rules_lib.preset("tensor")):
        got = run(by_chunks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)


def test_no_weight_no_loss_and_no_gradient():
    hidden, head, targets, _ = case()
    loss, grads = jax.value_and_grad(lambda h, w: head_loss(h, w, targets, jnp.zeros((8, 9)), chunk=5).total, (0, 1))(
        hidden, head
    )
    assert float(loss) == 0.0 and not any(np.asarray(g).any() for g in grads)


def test_memory_is_that_of_one_chunk():
    """At 2,048 tokens and 8,192 pieces, loss and both gradients; and a frozen head costs no product."""
    args = case(1, 2048, 32, 8192)
    full = jax.jit(jax.grad(lambda *a: all_at_once(*a)[0], argnums=(0, 1))).lower(*args).compile()
    few = jax.jit(jax.grad(lambda *a: by_chunks(*a, 64)[0], argnums=(0, 1))).lower(*args).compile()
    temp = lambda compiled: compiled.memory_analysis().temp_size_in_bytes  # noqa: E731
    assert temp(full) > 8 * temp(few), (temp(full), temp(few))
    frozen = jax.jit(jax.grad(lambda *a: by_chunks(*a, 64)[0])).lower(*args).compile()
    flops = lambda compiled: compiled.cost_analysis()["flops"]  # noqa: E731  (of one turn of the loop)
    assert flops(few) - flops(frozen) > 0.9 * 2 * 64 * 32 * 8192


@needs_8
@pytest.mark.parametrize(
    "sizes, rules",
    [
        ({"data": 8}, "data"),
        ({"data": 2, "fsdp": 4}, "fsdp"),
        ({"fsdp": 2, "tensor": 4}, "fsdp_tensor"),
        ({"tensor": 8}, "fsdp_tensor"),
        ({"fsdp": 2, "context": 2, "tensor": 2}, "fsdp_context_tensor"),
    ],
)
def test_rows_their_positions_and_the_vocabulary_are_split(sizes, rules):
    args = case(T=10)
    want = jax.value_and_grad(all_at_once, argnums=(0, 1), has_aux=True)(*args)
    mesh, rules = mesh_lib.make_mesh(sizes), rules_lib.preset(rules)
    where = rules.shardings(mesh, {"head": ("embed", "vocab")})["head"]
    rows = rules_lib.batch_sharding(mesh)
    placed = [jax.device_put(x, where if i == 1 else rows) for i, x in enumerate(args)]
    step = jax.jit(jax.value_and_grad(by_chunks, argnums=(0, 1), has_aux=True), static_argnums=4)
    with rules_lib.use(mesh, rules):
        close(step(*placed, 2), want)
        text = step.lower(*placed, 2).compile().as_text()
    if sizes == {"tensor": 8}:  # no device ever has logits of the whole vocabulary
        assert "f32[2,12]" in text and "f32[2,96]" not in text
