"""The distributed sigmoid losses against the dense one, on 1 to 8 emulated devices, and what they keep in memory.

Not covered: overlap of transfers with products, which the CPU's compiler has not (benchmarks/sigmoid_loss.py shows it
for TPU topologies).
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmv_jax.losses import negatives as negatives_lib
from glmv_jax.losses.sigmoid import sigmoid_loss
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.typing import UserError

E = 16
IMPLS = ("ring_bidir", "allgather_chunked")


def mesh_of(**sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def batch(rows, texts=1, seed=0, concepts=None):
    rng = np.random.default_rng(seed)
    unit = lambda *shape: (x := rng.normal(size=shape)) / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    arrays = unit(rows, E), unit(rows, texts, E), np.log(8.0), -3.0
    concept = None if concepts is None else rng.integers(0, concepts, rows)
    return tuple(np.asarray(a, np.float32) for a in arrays), concept


def both(impl, mesh, rows, texts=1, concepts=None, **options):
    """(loss, metrics, gradients) of `impl` with rows split over the mesh, and of the dense form on one device."""
    args, concept = batch(rows, texts, concepts=concepts)

    def run(placed, concept_B, **kw):
        f = lambda *a: sigmoid_loss(*a, concept_B, **kw)  # noqa: E731
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True))(*placed)

    split = NamedSharding(mesh, PartitionSpec(tuple(mesh.shape)))
    put = lambda x: jax.device_put(x, split if np.ndim(x) else NamedSharding(mesh, PartitionSpec()))  # noqa: E731
    got = run(tuple(map(put, args)), None if concept is None else put(concept), impl=impl, mesh=mesh, **options)
    return jax.device_get(got), jax.device_get(run(args, concept))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mesh", [1, 2, 3, 4, 5, 6, 7, 8, (2, 4), (4, 2)], ids=str)
def test_equals_dense(impl, mesh):
    sizes = {"data": mesh} if isinstance(mesh, int) else {"data": mesh[0], "fsdp": mesh[1]}
    devices = int(np.prod(list(sizes.values())))
    ((loss, metrics), grads), ((want_loss, want_metrics), want) = both(
        impl, mesh_of(**sizes), 6 * devices, texts=2, concepts=4 * devices, wire="float32", chunk=3)
    assert loss == pytest.approx(want_loss, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, want_metrics)
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(expected).max() > 1e-4


def test_in_whatever_order_the_ring_goes(monkeypatch):
    monkeypatch.setattr(negatives_lib, "ring_order", lambda mesh, axes: [2, 0, 3, 5, 1, 4])
    (_, grads), (_, want) = both("ring_bidir", mesh_of(data=6), 12, wire="float32")
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gathered", [1, 8, 20])
def test_in_however_many_pieces_everything_is_gathered(monkeypatch, gathered):
    """12 rows on each of 4 devices: one by one, two or four a device at a time."""
    monkeypatch.setattr(negatives_lib, "GATHERED", gathered)
    ((_, metrics), grads), ((_, want_metrics), want) = both(
        "allgather_chunked", mesh_of(data=4), 48, texts=2, concepts=30, wire="float32", chunk=5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, want_metrics)
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_other_axes_of_the_mesh_hold_copies(impl):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    args, _ = batch(8)
    loss = jax.jit(functools.partial(sigmoid_loss, impl=impl, mesh=mesh, wire="float32"))(*args)[0]
    assert float(loss) == pytest.approx(float(sigmoid_loss(*args)[0]), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_on_the_wire(impl):
    """Features of unit norm and width 16 lose 2^-9 each: about 1 % of a gradient, nothing to speak of in the loss."""
    ((loss, _), grads), ((want_loss, _), want) = both(impl, mesh_of(data=4), 32)
    assert loss == pytest.approx(want_loss, rel=2e-3)
    for got, expected in zip(grads[:2], want, strict=False):
        assert np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected)
        assert got.dtype == np.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_what_travels_is_bfloat16_and_the_program_does_not_grow_with_the_ring(impl):
    """With a gradient too: features travel, and no gradient does."""

    def transfers(devices, transform):
        mesh = mesh_of(data=devices)
        args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8 * devices, E), (8 * devices, E), (), ())]
        run = jax.jit(transform(lambda *a: sigmoid_loss(*a, impl=impl, mesh=mesh)[0]))
        sends = "collective_permute|all_gather|reduce_scatter|all_to_all"
        return re.findall(rf"stablehlo\.(?:{sends}).*-> tensor<(.*)>", run.lower(*args).as_text())

    for transform in (lambda f: f, jax.grad):
        features = [kind for kind in transfers(8, transform) if f"x{E}x" in kind]
        assert features and all(kind.endswith("bf16") for kind in features)
        assert len(transfers(8, transform)) == len(transfers(6, transform))


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_does_not_hold_the_logits(monkeypatch, impl):
    """At 8 devices and 512 rows a device the n x B logits are 8 MiB a device; the dense form keeps several."""
    monkeypatch.setattr(negatives_lib, "GATHERED", 1024)
    mesh, rows = mesh_of(data=8), 4096
    split = NamedSharding(mesh, PartitionSpec("data"))
    args = [jax.ShapeDtypeStruct((rows, E), jnp.float32, sharding=split)] * 2
    args += [jax.ShapeDtypeStruct((), jnp.float32)] * 2

    def temporary(impl):
        f = jax.grad(lambda *a: sigmoid_loss(*a, impl=impl, mesh=mesh, chunk=64)[0], argnums=(0, 1, 2, 3))
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    logits = rows // 8 * rows * 4
    assert temporary(impl) < logits / 6 < logits < temporary("dense")


def test_wrong_input():
    args, _ = batch(6)
    with pytest.raises(UserError, match="impl='ring'.*choose from dense"):
        sigmoid_loss(*args, impl="ring")
    with pytest.raises(UserError, match="needs a mesh"):
        sigmoid_loss(*args, impl="ring_bidir")
    with pytest.raises(UserError, match="6 images do not divide over 4 devices"):
        sigmoid_loss(*args, impl="ring_bidir", mesh=mesh_of(data=4))
