"""Latent attention's and the indexer's TPU kernels, in the interpreter, against the jnp twin. Not covered: what a chip
does with them; that they compile for one is tests/aot's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import latent_attention as lib
from glmv_jax.kernels import lightning, selected
from glmv_jax.kernels.span import IN_ORDER, Span, visible
from glmv_jax.parallel import context, remat
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.rules import preset, use

H, N, R, C, V, J, K = 2, 24, 8, 16, 40, 3, 16
KERNELS = functools.partial(lib._kernels, interpret=True)


def inputs(T: int, rows: int = 2):
    """Two segments and padding in the first row, one segment in the others."""
    rng = np.random.default_rng(T)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    heads = lib.Heads(f32(rows, T, H, N), f32(rows, T, H, R), f32(C, H, N), f32(C, H, V))
    index = lib.Index(f32(rows, T, J, K), f32(rows, T, J), f32(rows, T, K))
    segments = np.ones((rows, T), np.int32)
    segments[0, T // 3 :], segments[0, T - T // 5 :] = 2, 0
    span = Span(jnp.asarray(segments), jnp.broadcast_to(jnp.arange(T), (rows, T)), in_order=IN_ORDER)
    return heads, lib.Latents(f32(rows, T, C), f32(rows, T, R)), span, index, (f32(rows, T, H, V), f32(rows, T))


def run(path, top_k, heads, latents, span, index, given):
    """(out, loss), and their gradients by all that has one."""

    def both(heads, latents, index):
        looked = path(heads, latents, span, span, index, None, top_k=top_k, with_loss=True)
        return looked.out, looked.loss

    def with_gradients(heads, latents, index, given):
        out, pull = jax.vjp(both, heads, latents, index)
        return out, pull(given)

    return jax.jit(with_gradients)(heads, latents, index, given)


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


TWIN = functools.partial(lib._by_blocks, block=512)


@pytest.mark.parametrize(("T", "top_k"), [(640, 48), (256, 0)])
def test_is_its_twin_forward_and_backward(T, top_k):
    """Sparse over several blocks of 128; and with top_k=0 dense, in one."""
    args = inputs(T)
    assert_close(run(KERNELS, top_k, *args), run(TWIN, top_k, *args))


def test_long_rows_have_their_scores_of_few_queries_at_a_time(monkeypatch):
    """As rows of 128K: the scores of 32 queries at once, over two blocks of 512 keys; the gradient of keys from four
    blocks of queries, two of which look at the first block alone."""
    assert lightning.queries_at_once(1 << 17) == 32
    monkeypatch.setattr(lightning, "_ROWS", 32 * 4 * 1024)
    args = inputs(1024, rows=1)
    assert_close(run(KERNELS, 100, *args), run(TWIN, 100, *args))


def test_ties_go_to_the_earlier_key():
    """Scores of small whole numbers, most of them equal to others; and a zero of either sign is one zero."""
    T, top_k = 256, 20
    heads, latents, span, index, _ = inputs(T)
    rng = np.random.default_rng(0)
    whole = lambda x, low: jnp.asarray(rng.integers(low, 2, x.shape), jnp.float32)  # noqa: E731
    index = lib.Index(whole(index.q, 0), whole(index.w, -1), whole(index.k, -1))
    keys = lightning.choose(index, span, span, top_k, interpret=True)
    seen = visible(span, span)
    want = lib.select(lib.index_scores(index), seen, top_k)
    assert not np.array_equal(want, lib.select(-jnp.arange(T) + 0 * lib.index_scores(index), seen, top_k))
    np.testing.assert_array_equal(selected.chosen(keys.order, keys.last, keys.cut), want)
    got, scores = (jnp.where(seen, x, 0) for x in (lightning.scores(keys.order), lib.index_scores(index)))
    np.testing.assert_array_equal(got, scores)


def test_a_layer_sees_what_an_earlier_one_chose():
    heads, latents, span, index, _ = inputs(256)
    first = KERNELS(heads, latents, span, span, index, None, top_k=32, with_loss=False)
    mask = lib.Selection(selected.chosen(*first.selection.keys[:3]))
    other = heads._replace(q=-heads.q)
    got, want = (
        path(other, latents, span, span, None, chosen, top_k=32, with_loss=False).out
        for path, chosen in ((KERNELS, first.selection), (TWIN, mask))
    )
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_over_a_mesh(monkeypatch):
    """Rows, and parts of rows in the devices' order, each on its own device."""
    args = inputs(256)
    want = run(TWIN, 40, *args)
    monkeypatch.setattr(lib, "supported", lambda *_: True)
    monkeypatch.setattr(lib, "_kernels", KERNELS)
    with use(make_mesh({"data": 2, "context": 2}, jax.devices()[:4]), preset("context")):
        order = context.order(256)
        of_row = lambda x: x.shape[:2] == (2, 256)  # noqa: E731
        deal = lambda tree, order: jax.tree.map(lambda x: x[:, order] if of_row(x) else x, tree)  # noqa: E731
        got = run(lib.latent_attention, 40, *deal(args, order))
    assert_close(deal(got, np.argsort(order)), want)


def test_is_taken_where_it_can_be(monkeypatch):
    heads, latents, span, index, _ = inputs(256)
    wide = lambda n, x: jnp.zeros((*x.shape[:-1], n))  # noqa: E731
    heads = lib.Heads(wide(96, heads.q), wide(32, heads.r), wide(96, heads.uk), wide(128, heads.uv))
    index = lib.Index(wide(128, index.q), index.w, wide(128, index.k))
    ask = lambda span=span, heads=heads, loss=True, selection=None, index=index: lib.supported(  # noqa: E731
        heads, latents, span, span, index, selection, loss
    )

    def of_rows(n: int) -> bool:
        long = lambda x: jax.ShapeDtypeStruct((1, n, *x.shape[2:]), x.dtype) if x.shape[:2] == (2, 256) else x  # noqa: E731
        *given, with_index = jax.tree.map(long, (heads, latents, span, span, index))
        return lib.supported(*given, with_index, None, True)

    assert not ask(), "no TPU"
    monkeypatch.setattr(lib.rules, "device", lambda: type("Chip", (), {"platform": "tpu"}))
    assert ask()
    assert of_rows(1 << 17) and not of_rows(1 << 18), "rows up to 128K"
    assert not ask(span=span._replace(in_order=None)), "keys of which nothing is known"
    assert not ask(heads=heads._replace(uv=heads.uv[..., :64])), "narrow heads"
    assert not ask(index=None), "nothing has chosen"
    assert not ask(index=None, selection=lib.Selection(jnp.ones((2, 256, 256), bool))), "chosen by the other path"
    with use(make_mesh({"tensor": 2}, jax.devices()[:2]), preset("tensor")):
        assert ask(loss=False) and not ask(), "a loss of half the heads"


def used(traced, name: str) -> int:
    """How many kernels of this name there are whose results something reads."""
    read = {id(x) for op in traced.eqns for x in op.invars} | {id(x) for x in traced.outvars}
    here = [op for op in traced.eqns if op.params.get("name") == name and any(id(x) in read for x in op.outvars)]
    again = (op.params["jaxpr"] for op in traced.eqns if op.primitive.name in ("checkpoint", "remat2"))
    return len(here) + sum(used(inner, name) for inner in again)


@pytest.mark.parametrize(("name", "runs"), [("full", 2), ("attention", 1), ("dots", 1)])
def test_attention_is_run_once_where_its_result_is_kept(name, runs):
    """Counted in the traced program; nothing is run. The loss of the indexer is not asked for."""
    heads, latents, span, index, _ = inputs(256)

    def loss(heads, latents):
        @functools.partial(jax.checkpoint, policy=remat.policy(name))
        def layer(heads, latents):
            return jnp.tanh(KERNELS(heads, latents, span, span, index, None, top_k=32, with_loss=False).out)

        return layer(heads, latents).sum()

    traced = jax.make_jaxpr(jax.grad(loss))(heads, latents).jaxpr
    assert used(traced, "selected_forward") == runs and used(traced, "selected_backward_q") == 1
