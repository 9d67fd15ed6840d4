"""Rows split over devices: order and balance by counting, what passes between devices against plain indexing, attention
against one device and by its compiled collectives.

Whole models are in test_context_models.py. Not covered: speed, several hosts.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import latent_attention
from glmv_jax.kernels.attention import attention
from glmv_jax.kernels.span import Span, visible
from glmv_jax.losses.select import select
from glmv_jax.parallel import context
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import UserError
from tests.parallel.collectives import collectives

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
T = 32


@contextlib.contextmanager
def split(**sizes: int):
    """Within it rows are split over the first devices, in a mesh of these sizes."""
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    with rules_lib.use(mesh, rules_lib.preset("fsdp_context_tensor")):
        yield


def packed(lengths, T: int = T) -> np.ndarray:
    """[1, T] segments of these lengths, then padding."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(segments, (0, T - len(segments)))[None]


# --- order ------------------------------------------------------------------------------------------------------------


def pairs(lengths, T: int, n: int, order: np.ndarray) -> np.ndarray:
    """How many keys the queries of each of n devices see, when they have positions in this order."""
    whole = Span(jnp.array(packed(lengths, T)), jnp.arange(T)[None])
    own = Span(*(x[:, order] for x in whole[:2]))
    return np.asarray(visible(own, whole))[0].reshape(n, -1).sum(1)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_every_device_sees_the_same_number_of_keys(n):
    with split(context=n):
        order = context.order(256)
    dealt, straight = (pairs([256], 256, n, x) for x in (order, np.arange(256)))
    assert dealt.tolist() == [256 * 257 // 2 // n] * n
    assert straight.sum() == dealt.sum() and straight[-1] / straight[0] > 1.9 * (n - 1)
    # Six documents of random lengths a row: the fullest device over the mean is 1.20, 1.44, 1.58 for 2, 4, 8 devices,
    # and 1.24, 1.63, 2.08 in the row's own order.
    rows = [np.floor(row * 256).astype(int) for row in np.random.default_rng(0).dirichlet(np.ones(6), 50)]
    uneven = lambda row, x: (p := pairs(row, 256, n, x)).max() / p.mean()  # noqa: E731
    dealt, straight = (np.mean([uneven(row, x) for row in rows]) for x in (order, np.arange(256)))
    assert dealt < straight


def test_rows_that_do_not_divide_are_named():
    with split(context=4):
        with pytest.raises(UserError, match="rows of 30 tokens do not divide over 2 x context=4; try 32"):
            context.order(30)
        with pytest.raises(UserError, match="chunks of 4 positions are too short to look 5 ahead"):
            context.shifted(jnp.zeros((1, T, 1)), 5)


@pytest.mark.parametrize("sizes", [{"context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_what_moves_by_positions_is_what_indexing_finds(sizes):
    B, D, more = 2, 3, 3
    x = jnp.array(np.random.default_rng(1).normal(size=(B, T, D)), jnp.float32)
    with split(**sizes):
        order = context.order(T)
        back = np.argsort(order)
        assert sorted(order) == list(range(T)) and order.tolist() != sorted(order)
        np.testing.assert_array_equal(jax.jit(lambda x: context.dealt(x))(x), x[:, order])
        for by in (-4, -1, 0, 2, 4):
            moved = jax.jit(lambda x, by=by: context.shifted(context.dealt(x), by))(x)
            np.testing.assert_array_equal(moved[:, back], np.roll(x, -by, axis=1))
        longer = jax.jit(lambda x: context.overlapping(x, more))(x)
        for by in range(more + 1):
            np.testing.assert_array_equal(context.ahead(longer, by, more)[:, back], np.roll(x, -by, axis=1))
        row = context.spec("batch", "length", None)
        whole = context.per_device(context.gathered, (row,), context.spec("batch", None, None), kernel=True)
        np.testing.assert_array_equal(jax.jit(lambda x: whole(context.dealt(x)))(x), x)


@pytest.mark.parametrize("count", [3, 10, 40])
def test_targets_are_those_of_one_device_whoever_has_them(count):
    rng = np.random.default_rng(2)
    tokens, weight = jnp.array(rng.integers(1, 99, (3, T))), jnp.array(rng.choice([0.0, 0.5, 1.0], (3, T)))
    x = jnp.array(rng.normal(size=(3, T, 5)), jnp.float32)
    find = jax.jit(lambda: select(tokens, jnp.ones_like(tokens), weight, count))
    alone = find()
    with split(context=4):
        find = jax.jit(lambda: select(tokens, jnp.ones_like(tokens), weight, count))
        split_up = find()
        before = jax.jit(lambda x, at: context.before(context.dealt(x), at, 3))(x, split_up.at_BJ)
    assert split_up.at_BJ.shape == (3, 4 * min(count, T // 4)) and split_up.cut == alone.cut
    for row in range(3):
        listed = [
            {(int(a), int(t), float(w)) for a, t, w in zip(f.at_BJ[row], f.tokens_BJ[row], f.weight_BJ[row]) if w}
            for f in (alone, split_up)
        ]
        assert listed[0] == listed[1] and len(listed[0]) == min(count, int((weight[row] > 0).sum()))
        at = np.asarray(split_up.at_BJ[row])
        np.testing.assert_array_equal(np.asarray(before[row])[at >= 3], np.asarray(x[row])[at[at >= 3] - 3])


# --- attention --------------------------------------------------------------------------------------------------------


def spans(order=None, branches=False) -> Span:
    segments = jnp.array(np.concatenate([packed([9, 14, 6]), packed([T])]))
    forks = jnp.array(np.concatenate([packed([4, 3, 7]) - 1, packed([T]) - 1])) if branches else None
    whole = Span(segments, jnp.broadcast_to(jnp.arange(T), segments.shape), forks)
    return whole if order is None else Span(*(None if x is None else x[:, order] for x in whole))


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("sizes", [{"context": 4}, {"fsdp": 2, "context": 2}, {"context": 2, "tensor": 2}])
def test_attention_equals_one_device_and_gathers_keys_and_values_alone(sizes, branches):
    B, H, G, K = 2, 6, 2, 5
    rng = np.random.default_rng(3)
    q, k, v, w = (jnp.array(rng.normal(size=(B, T, n, K)), jnp.float32) for n in (H, G, G, H))

    def loss(q, k, v, span, w):
        out = attention(q, k, v, span, span)
        return jnp.sum(out * w), out

    step = lambda: jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))  # noqa: E731
    want = step()(q, k, v, spans(branches=branches), w)
    with split(**sizes):
        order = context.order(T)
        mesh, rules = rules_lib.active()
        spec = lambda x: rules.spec(("batch", "length", "heads", None)[: x.ndim], mesh)  # noqa: E731
        place = lambda x: jax.device_put(x[:, order], jax.NamedSharding(mesh, spec(x)))  # noqa: E731
        args = (*map(place, (q, k, v)), jax.tree.map(place, spans(branches=branches)), place(w))
        lowered = step().lower(*args)
        got = step()(*args)
    close(got, jax.tree.map(lambda x: x[:, order] if x.ndim == 4 else x, want))

    # One device's keys, or their gradients before they are summed: B and G may be split as well.
    shared, n = sizes.get("fsdp", 1) * sizes.get("tensor", 1), sizes["context"]
    largest = B * T * G * K // shared
    found = collectives(lowered.compile())
    assert {c.kind for c in found} >= {"all-gather"} and len([c for c in found if c.size == largest]) >= 2
    wide = [c for c in found if c.size > B * T // n]
    assert all(c.kind in ("all-gather", "reduce-scatter", "all-reduce") and c.size <= largest for c in wide), wide
    assert largest < B * T * H * K // shared  # so that queries and outputs would have been seen


@pytest.mark.parametrize("sizes", [{"context": 4}, {"context": 2, "tensor": 2}])
@pytest.mark.parametrize("top_k", [0, 5])
def test_latent_attention_equals_one_device(sizes, top_k):
    """Scores of the indexer are rounded, so that keys tie and the earlier one has to win; its loss too."""
    B, H, N, R, C, V, J, K = 2, 4, 6, 4, 8, 3, 2, 4
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)  # noqa: E731
    heads = latent_attention.Heads(draw(B, T, H, N), draw(B, T, H, R), draw(C, H, N), draw(C, H, V))
    latents = latent_attention.Latents(draw(B, T, C), draw(B, T, R))
    index = latent_attention.Index(draw(B, T, J, K).round(), draw(B, T, J).round(), draw(B, T, K).round())
    w = draw(B, T, H, V)

    def loss(heads, latents, index, span, w):
        out = latent_attention.latent_attention(heads, latents, span, span, index, None, top_k, True, block=4)
        return jnp.sum(out.out * w) + out.loss.sum(), (out.out, out.loss)

    step = lambda: jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))  # noqa: E731
    want = step()(heads, latents, index, spans(), w)
    with split(**sizes):
        order = context.order(T)
        rows = lambda tree: jax.tree.map(lambda x: x[:, order] if x.shape[:2] == (B, T) else x, tree)  # noqa: E731
        got = step()(*rows((heads, latents, index, spans(), w)))
    close(got, rows(want))
