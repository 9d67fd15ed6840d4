"""Attention by tiles on a CPU against its plain twin, and what it leaves out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import attention as lib
from glmv_jax.kernels import tiles
from glmv_jax.kernels.span import IN_ORDER, Span, visible


def row(rng: np.random.Generator, T: int, prompts: int, answers: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and branches [T] of prompts with answers of random lengths, and padding."""
    ends = np.sort(rng.choice(np.arange(1, T), prompts * (answers + 1), replace=False))
    part = np.searchsorted(ends, np.arange(T), side="right")
    inside = part < len(ends)
    return np.where(inside, part // (answers + 1) + 1, 0), np.where(inside, part % (answers + 1), 0)


def inputs(T: int, rows: list[tuple[int, int]], heads: int = 4, groups: int = 2, K: int = 16, dtype: str = "float32"):
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.normal(size=(len(rows), T, n, K)), dtype)  # noqa: E731
    segments, branches = (jnp.asarray(np.stack(x)) for x in zip(*(row(rng, T, *counts) for counts in rows)))
    slots = jnp.broadcast_to(jnp.arange(T), segments.shape)
    return *map(draw, (heads, groups, groups, heads)), Span(segments, slots, branches, IN_ORDER)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(path, q, k, v, weight, where: Span):
    out, pull = jax.vjp(lambda q, k, v: path(q, k, v, where, where), q, k, v)
    return out, *pull(weight)


@pytest.mark.parametrize("T, heads, groups", [(256, 4, 2), (300, 2, 1), (1100, 3, 3)])
def test_is_its_twin_forward_and_backward(T, heads, groups):
    """Several prompts, one, and a row without branches; lengths that are no whole tiles, and both sizes of tiles."""
    given = inputs(T, [(3, 4), (1, 8), (1, 0)], heads, groups)
    got, want = (with_gradients(path, *given) for path in (tiles.tiled, lib.plain))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_half_precision_as_its_twin():
    given = inputs(256, [(2, 3)], dtype="bfloat16")
    exact = with_gradients(lib.plain, *(x.astype(jnp.float32) for x in given[:4]), given[4])
    for path in (tiles.tiled, lib.plain):
        got = with_gradients(path, *given)
        assert all(x.dtype == jnp.bfloat16 for x in got)
        errors = [np.linalg.norm(a.astype(jnp.float32) - b) / np.linalg.norm(b) for a, b in zip(got, exact)]
        assert max(errors) < 0.01, errors


def test_leaves_out_tiles_that_nobody_sees():
    """Each list begins with the tiles that hold a visible pair, and the longest of them is short."""
    where = inputs(256, [(3, 4)])[-1]
    spans = jax.tree.map(lambda x: x.reshape(1, -1, 32), Span(*where[:3]))
    lists = tiles._lists(spans)
    seen = np.asarray(visible(where, where)).reshape(8, 32, 8, 32).any((1, 3))
    counts = seen.sum(-1)
    assert lists.longest == counts.max() < 8
    for n in range(8):
        assert set(np.asarray(lists.keys)[0, n, : counts[n]]) == set(np.flatnonzero(seen[n]))


def test_attention_takes_it_for_long_rows_with_branches(monkeypatch):
    """It leaves rows that are short or have no branches, and queries of a cache."""
    taken = []
    monkeypatch.setattr(tiles, "tiled", lambda q, *rest: taken.append(q.shape[1]) or q)
    for T, keep in ((256, 4), (128, 4), (256, 3)):
        *qkv, _, where = inputs(T, [(1, 3)])
        where = where if keep == 4 else where._replace(branches=None)
        lib.attention(*qkv, where, where)
    *qkv, _, where = inputs(256, [(1, 3)])
    lib.attention(*qkv, where._replace(in_order=None), where)
    assert taken == [256]
