"""Slices of rows to other devices: the padded form against what `ragged_all_to_all` is documented to do, and its
gradient. Not covered: the ragged form itself, which no CPU runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glmv_jax.kernels import exchange as lib
from glmv_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 (emulated) devices")


def over(devices, fn, *arrays):
    """fn of each device's row of the arrays."""
    mesh = make_mesh({"expert": devices}, jax.devices()[:devices])
    local = lambda *own: jax.tree.map(lambda x: x[None], fn(*(x[0] for x in own)))  # noqa: E731
    spec = P("expert")
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)


def test_the_example_of_its_documentation():
    """Two devices, a slice for each: docs.jax.dev, jax.lax.ragged_all_to_all."""
    x = jnp.array([[1, 2, 2], [3, 4, 0]])[..., None]
    start, size, put, got = (jnp.array(a) for a in ([[0, 1]] * 2, [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]]))
    out = over(2, lambda x, *ways: lib.padded(x, lib.Slices(*ways), "expert", 4, 2), x, start, size, put, got)
    np.testing.assert_array_equal(out[..., 0], [[1, 3, 0, 0], [2, 2, 4, 0]])


def drawn(S=4, each=3, R=40, seed=0):
    """Slices of every device to every other, `each` of them, some empty; and the way back. [S, S * each] each field."""
    rng = np.random.default_rng(seed)
    size_SDK = rng.integers(0, 4, (S, S, each)) * (rng.random((S, S, each)) < 0.8)
    place = lambda sizes: np.cumsum(sizes.reshape(S, -1), 1).reshape(sizes.shape) - sizes  # noqa: E731  side by side
    start_SDK = place(size_SDK)
    put_SDK = place(size_SDK.transpose(1, 2, 0)).transpose(2, 0, 1)  # there: by slice, then by sender
    turned = lambda x: x.swapaxes(0, 1)  # noqa: E731
    flat = lambda *fields: lib.Slices(*(jnp.array(x.reshape(S, -1), jnp.int32) for x in fields))  # noqa: E731
    there = flat(start_SDK, size_SDK, put_SDK, turned(size_SDK))
    back = flat(turned(put_SDK), turned(size_SDK), turned(start_SDK), size_SDK)
    return there, back, jnp.array(rng.normal(size=(S, R, 5)), jnp.float32)


def by_loop(there, x, rows):
    """As documented, a slice at a time, in NumPy."""
    S, G = there.start.shape
    out = np.zeros((S, rows, x.shape[-1]), np.float32)
    for sender in range(S):
        for g in range(G):
            to, start, size, put = g // (G // S), *(int(f[sender, g]) for f in there[:3])
            out[to, put : put + size] = x[sender, start : start + size]
    return out


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop_over_slices_and_comes_back(seed):
    there, back, x = drawn(seed=seed)
    go = functools.partial(lib.padded, axis="expert", rows=48, most=12)
    out = over(4, lambda x, *ways: go(x, lib.Slices(*ways)), x, *there)
    np.testing.assert_array_equal(out, by_loop(there, np.asarray(x), 48))
    home = over(4, lambda x, *ways: lib.padded(x, lib.Slices(*ways), "expert", 40, 12), out, *back)
    sent = np.arange(40) < np.asarray(there.size).sum(1)[:, None]
    np.testing.assert_array_equal(home, np.where(sent[..., None], x, 0))


def test_the_gradient_goes_the_way_back():
    """Against the transposed of the loop, as a matrix."""
    there, back, x = drawn()
    g = jnp.array(np.random.default_rng(9).normal(size=(4, 48, 5)), jnp.float32)

    def pulled(x, g, *ways):
        go = lambda x: lib.exchange(x, lib.Slices(*ways[:4]), lib.Slices(*ways[4:]), "expert", 48, 12, True)  # noqa: E731
        return jax.vjp(go, x)[1](g)[0]

    got = over(4, pulled, x, g, *there, *back)
    eye = np.eye(4 * 40, dtype=np.float32).reshape(4, 40, -1)
    matrix = by_loop(there, eye, 48).reshape(4 * 48, 4 * 40)
    np.testing.assert_allclose(got.reshape(160, 5), matrix.T @ np.asarray(g).reshape(192, 5), rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_which_rows_were_put(seed):
    """Of what the ragged form leaves as it found it the rest is told apart, on either way."""
    there, back, x = drawn(seed=seed)
    for way, own, rows in ((there, back, 48), (back, there, 40)):
        there_are = by_loop(way, np.ones((4, 48, 1)), rows)[..., 0] > 0
        mine = [lib.Slices(*(field[d] for field in own)) for d in range(4)]
        np.testing.assert_array_equal([lib.put(one, rows) for one in mine], there_are)
