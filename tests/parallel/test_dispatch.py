"""The all-to-all of rows on eight emulated devices against NumPy, and images encoded elsewhere against at home.

"ragged" is compiled for a TPU topology only (XLA's CPU backend has not got it): that it transfers what "padded" does is
not covered.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glmv_jax.data import balancing, naflex
from glmv_jax.models import vlm
from glmv_jax.parallel.dispatch import check, dispatch
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.typing import UserError, VisionInput
from tests import tiny_vlm

MESHES = [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 3}]


def mesh_of(sizes):
    return make_mesh(sizes, jax.devices()[:int(np.prod(list(sizes.values())))])


def put(mesh, tree):
    return jax.device_put(tree, NamedSharding(mesh, P(tuple(mesh.shape))))


def table(R: int, n: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Random counts [R, R] within the room, with pairs that exchange nothing."""
    counts = rng.integers(0, n // 2, (R, R)) * (rng.random((R, R)) < 0.6)
    for _ in range(100 * R * R):
        over = np.argwhere((counts.sum(1)[:, None] > n) | (counts.sum(0)[None] > rows) & (counts > 0))
        over = [tuple(at) for at in over if counts[tuple(at)]]
        if not over:
            break
        counts[over[0]] -= 1
    return counts.astype(np.int32)


def moved(x: np.ndarray, counts: np.ndarray, rows: int) -> np.ndarray:
    """What the devices have afterwards, piece by piece."""
    R, n = len(counts), len(x) // len(counts)
    out = np.zeros((R, rows, *x.shape[1:]), x.dtype)
    for d in range(R):
        pieces = [x[s * n + counts[s, :d].sum():][:counts[s, d]] for s in range(R)]
        got = np.concatenate(pieces)
        out[d, :len(got)] = got
    return out.reshape(-1, *x.shape[1:])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_arrive_as_counted(sizes):
    mesh, rng = mesh_of(sizes), np.random.default_rng(0)
    R, n, rows = mesh.size, 12, 20
    run = jax.jit(functools.partial(dispatch, mesh=mesh, axes=tuple(sizes), rows=rows))
    for _ in range(5):
        counts = table(R, n, rows, rng)
        assert counts.any() and (counts == 0).any()
        check(counts, n, rows)
        tree = {"patches": rng.integers(1, 256, (R * n, 6), np.uint8), "yx": rng.integers(1, 9, (R * n, 2), np.int32),
                "features": rng.normal(size=(R * n, 3, 2)).astype(np.float32)}
        got = run(put(mesh, tree), counts)
        jax.tree.map(np.testing.assert_array_equal, got, {k: moved(x, counts, rows) for k, x in tree.items()})
        assert got["patches"].dtype == np.uint8


def test_a_bound_on_the_pieces_changes_nothing_but_their_size():
    mesh, rng = mesh_of({"data": 8}), np.random.default_rng(1)
    counts = np.minimum(table(8, 32, 40, rng), 5)
    x = rng.normal(size=(8 * 32, 4)).astype(np.float32)
    run = lambda longest: jax.jit(functools.partial(  # noqa: E731
        dispatch, mesh=mesh, axes=("data",), rows=40, longest=longest))
    np.testing.assert_array_equal(run(5)(put(mesh, x), counts), moved(x, counts, 40))
    programs = {k: run(k).lower(put(mesh, x), counts).compile().as_text() for k in (5, None)}
    sizes = {k: int(re.search(r"f32\[1,(\d+),4\][^=]* all-to-all\(", hlo)[1]) for k, hlo in programs.items()}
    assert sizes == {5: 5, None: 32}


def test_there_and_back_is_where_it_was():
    mesh, rng = mesh_of({"data": 2, "fsdp": 4}), np.random.default_rng(2)
    counts = table(8, 12, 20, rng)
    x = rng.normal(size=(8 * 12, 3)).astype(np.float32)
    go = lambda x, counts, rows: dispatch(x, counts, mesh, ("data", "fsdp"), rows=rows)  # noqa: E731
    back = jax.jit(lambda x, counts: go(go(x, counts, 20), counts.T, 12))(put(mesh, x), counts)
    kept = np.arange(12)[None] < counts.sum(1)[:, None]
    np.testing.assert_array_equal(np.asarray(back).reshape(8, 12, 3), x.reshape(8, 12, 3) * kept[..., None])


def test_gradients_travel_back():
    """Of a weighted sum of squares of what arrives; also against autodiff through the padded form without our rule."""
    mesh, rng = mesh_of({"data": 8}), np.random.default_rng(3)
    counts, n, rows = table(8, 12, 20, rng), 12, 20
    x = rng.normal(size=(8 * n, 3)).astype(np.float32)
    weight = rng.normal(size=(8 * rows, 3)).astype(np.float32)
    loss = lambda x: (weight * dispatch(x, counts, mesh, ("data",), rows=rows) ** 2).sum()  # noqa: E731
    got = jax.jit(jax.grad(loss))(put(mesh, x))
    where = moved(np.arange(1, 8 * n + 1), counts, rows)  # the row, from 1, that arrived; 0 for none
    plain = lambda x: (weight * jnp.where(where[:, None] > 0, x[where - 1], 0) ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(got, jax.grad(plain)(x), rtol=1e-6)
    assert np.count_nonzero(np.asarray(got).any(1)) == counts.sum()


def test_what_does_not_fit_is_said():
    mesh = mesh_of({"data": 8})
    counts = np.full((8, 8), 2, np.int32)
    check(counts, 16, 16)
    for more, message in (((15, 16), "sends 16 rows and has room for 15"), ((16, 15), "gets 16 rows"),
                          ((16, 16, 1), "sends to one other 2 rows and has room for 1")):
        with pytest.raises(UserError, match=message):
            check(counts, *more)
    x = jnp.zeros((8 * 16, 2))
    with pytest.raises(UserError, match="impl='raged' is not known"):
        dispatch(x, counts, mesh, ("data",), rows=16, impl="raged")
    with pytest.raises(UserError, match=r"table of \(8, 8\) counts for 4 devices"):
        dispatch(x, counts, mesh_of({"data": 4}), ("data",), rows=16)
    with pytest.raises(TypeError):  # arrays travel, Python objects do not
        dispatch({"id": "sample/1"}, counts, mesh, ("data",), rows=16)


# ------------------------------------------------------------------------------------------- images encoded elsewhere


def test_images_encoded_on_other_devices_give_the_same_tokens_and_gradients():
    """Eight uneven ranks: patches go where the plan says, are encoded there, and their tokens come back."""
    cfg, C = tiny_vlm.config(), 12
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, depth=1))
    params = {name: tiny_vlm.params(cfg)[name] for name in ("vision", "merger")}
    mesh, rng = mesh_of({"data": 8}), np.random.default_rng(4)
    P_, room = 160, 64  # patches of a row, and what a rank encodes
    grids = [[(2, 3), (4, 4), (3, 3)], [], [(1, 1)], [(5, 2), (2, 2), (1, 3), (3, 2)], [(2, 2)], [(6, 2)], [], [(1, 4)]]
    sizes = [[4 * h * w for h, w in own] for own in grids]
    plan = balancing.exchange(sizes, room)
    check(plan.counts, P_, room)
    assert balancing.imbalance(plan.counts.sum(0)[:, None])[0] < 0.6 * balancing.imbalance(plan.counts.sum(1)[:, None])

    def row(own, order, first):
        """Images in an order, and for each visual token of the original order the row that it has now."""
        data = np.random.default_rng(first)
        pixels = [data.integers(0, 256, (4 * h * w, C), np.uint8) for h, w in own]
        a = {"patches": np.zeros((P_, C), np.uint8), "yx": np.zeros((P_, 2), np.int32), "frame": np.zeros(P_, np.int32)}
        at, rows = 0, [np.zeros(0, int)] * len(own)
        for i in order:
            n = len(pixels[i])
            a["patches"][at:at + n], a["frame"][at:at + n] = pixels[i], 100 * first + i + 1  # unique over all ranks
            a["yx"][at:at + n] = naflex.grid_coordinates(2 * own[i][0], 2 * own[i][1])
            rows[i] = np.arange(at, at + n, 4) // 4
            at += n
        return a, np.concatenate([np.zeros(0, int), *rows])

    plain, moved_ = ([row(own, order, s) for s, (own, order) in enumerate(zip(grids, orders))]
                     for orders in ([range(len(own)) for own in grids], plan.order))
    weight = [rng.normal(size=(len(rows), tiny_vlm.WIDTH)).astype(np.float32) for _, rows in plain]

    def weighed(tokens_RMD, made):
        picked = [tokens_RMD[s][rows] for s, (_, rows) in enumerate(made)]
        return sum((x * w).sum() for x, w in zip(picked, weight)), jnp.concatenate(picked)

    arrays = lambda made: {name: np.stack([a[name] for a, _ in made]) for name in made[0][0]}  # noqa: E731

    def at_home(params, a):
        return weighed(vlm.encode_images(cfg, params, VisionInput(a["patches"], a["yx"], a["frame"])), plain)

    def elsewhere(params, a, counts):
        sent = dispatch({k: x.reshape(-1, *x.shape[2:]) for k, x in a.items()}, counts, mesh, ("data",), rows=room)
        here = VisionInput(*(sent[k].reshape(8, room, *sent[k].shape[1:]) for k in ("patches", "yx", "frame")))
        tokens = vlm.encode_images(cfg, params, here)
        back = dispatch(tokens.reshape(-1, tiny_vlm.WIDTH), counts.T // 4, mesh, ("data",), rows=P_ // 4)
        return weighed(back.reshape(8, P_ // 4, -1), moved_)

    want_grads, want = jax.jit(jax.grad(at_home, has_aux=True))(params, arrays(plain))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    run = jax.jit(jax.grad(elsewhere, has_aux=True))
    args = everywhere, put(mesh, arrays(moved_)), plan.counts
    program = run.lower(*args).compile()
    grads, got = program(*args)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max() + 1e-6), grads, want_grads)
    hlo = program.as_text()
    assert re.search(r"u8\[[^=]* all-to-all\(", hlo) and not re.search(r"u8\[[^=]* all-gather\(", hlo)


# --------------------------------------------------------------------------------------------------- TPU, compiled

TPU = """
import functools, re, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from glmv_jax.parallel.compiler import SETS
from glmv_jax.parallel.dispatch import dispatch
from glmv_jax.parallel.mesh import make_mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = make_mesh({"data": 2, "fsdp": 4}, devices)
rows, everywhere = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
shape = lambda s, d, at: jax.ShapeDtypeStruct(s, d, sharding=at)
def loss(weight, other, patches, text, counts):
    sent = dispatch(patches, counts, mesh, ("data", "fsdp"), rows=1024)
    features = (sent.astype(jnp.bfloat16) @ weight)
    back = dispatch(features, counts.T, mesh, ("data", "fsdp"), rows=1024)
    words = jax.nn.relu(text @ other) @ other.T  # what does not depend on patches
    return (back.astype(jnp.float32) ** 2).sum() + (words.astype(jnp.float32) ** 2).sum()
args = (shape((588, 256), jnp.bfloat16, everywhere), shape((1024, 4096), jnp.bfloat16, everywhere),
        shape((8 * 1024, 588), jnp.uint8, rows),
        shape((8 * 4096, 1024), jnp.bfloat16, rows), shape((8, 8), jnp.int32, everywhere))
hlo = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile(compiler_options=SETS["async"]).as_text()
for name in ("ragged-all-to-all-start", "ragged-all-to-all", "all-gather", "all-to-all"):
    print(name, len(re.findall(rf" {name}\\(", hlo)))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'glmv_jax[tpu]'")
def test_on_tpus_the_pieces_are_ragged_and_asynchronous_and_nothing_is_gathered():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
           "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", TPU], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.split() for line in done.stdout.splitlines()[-4:])
    # Patches there, features back, and their gradient there again; pixels have none. All while text is computed.
    assert found == {"ragged-all-to-all-start": "3", "ragged-all-to-all": "0", "all-gather": "0", "all-to-all": "0"}
