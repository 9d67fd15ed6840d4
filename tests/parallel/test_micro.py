"""A batch in pieces against the whole: same loss and gradient, less memory. Not covered: host offload."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmv_jax.parallel import rules
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.micro import in_chunks, in_pieces, pieces_for
from glmv_jax.typing import UserError


def tower(params, rows):
    x = rows["x"]
    for w in params:
        x = x + jnp.tanh(x @ w)
    return {"z": x / jnp.linalg.norm(x, axis=-1, keepdims=True) * rows["gain"][:, None]}


def contrast(params, rows, pieces):
    z = in_pieces(lambda r: tower(params, r), rows, pieces)["z"]
    return jax.nn.softplus(5.0 * z @ z.T).sum() / len(z) - (z * rows["x"]).sum()


def inputs(B=24, D=8, depth=3):
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(D, D)), jnp.float32) for _ in range(depth)]
    return params, {"x": jnp.asarray(rng.normal(size=(B, D)), jnp.float32), "gain": jnp.arange(1.0, B + 1) / B}


@pytest.mark.parametrize("devices, pieces", [(1, 1), (1, 2), (1, 3), (1, 24), (4, 1), (4, 2), (4, 3)])
def test_gradient_of_the_whole_batch(devices, pieces):
    params, rows = inputs()
    mesh = make_mesh({"data": devices}, jax.devices()[:devices])
    split = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(jax.value_and_grad(contrast, argnums=(0, 1)), static_argnums=2)
    (loss, grads), (want_loss, want) = step(params, split, pieces), step(params, rows, 1)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, want)


def test_rows_come_back_in_order():
    rows = jnp.arange(12.0)
    np.testing.assert_array_equal(in_pieces(lambda x: -x, rows, 4), -rows)


def test_no_row_moves_between_devices():
    params, rows = inputs()
    split = NamedSharding(make_mesh({"data": 4}, jax.devices()[:4]), PartitionSpec("data"))
    embed = jax.jit(lambda p, r: in_pieces(lambda q: tower(p, q), r, 3)["z"], in_shardings=(None, split),
                    out_shardings=split)  # fmt: skip
    text = embed.lower(params, rows).compile().as_text()
    assert not any(f" {kind}" in text for kind in ("all-to-all", "all-gather", "collective-permute"))


def test_memory_is_that_of_a_piece():
    params, rows = inputs(B=4096, D=32, depth=8)
    step = jax.jit(jax.grad(lambda p, r, n: (in_pieces(lambda q: tower(p, q), r, n)["z"] ** 3).sum()), static_argnums=2)
    used = lambda n: step.lower(params, rows, n).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    assert used(16) < used(1) / 3


def test_pieces():
    assert pieces_for(64, 1, 256, 0) == 1
    assert pieces_for(64, 1, 256, 64 * 256) == 1
    assert pieces_for(64, 1, 256, 64 * 256 - 1) == 2
    assert pieces_for(64, 4, 1024, 4096) == 4  # 16 rows a device, 4 at a time
    assert pieces_for(12, 2, 100, 250) == 3  # 6 rows a device: 2 at a time
    assert pieces_for(12, 2, 100, 1) == 6
    with pytest.raises(UserError, match="10 rows do not divide into 3 pieces"):
        in_pieces(lambda x: x, jnp.zeros(10), 3)


def test_chunks_of_rows_come_back_in_order_and_no_position_moves():
    """Four by four positions to one, of rows that are split over two devices, 8 positions of a device at a time."""
    mesh = make_mesh({"data": 2, "context": 2}, jax.devices()[:4])
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 3)), jnp.float32)
    seen = []

    def merged(x_BtD):
        seen.append(x_BtD.shape)
        B, t, D = x_BtD.shape
        return jnp.tanh(x_BtD.reshape(B, t // 4, 4 * D))

    split = NamedSharding(mesh, PartitionSpec("data", "context"))
    with rules.use(mesh, rules.preset("context")):
        chunked = jax.jit(lambda x: in_chunks(merged, x, 8, 4), in_shardings=split, out_shardings=split)
        program = chunked.lower(x_BTD).compile()
        np.testing.assert_array_equal(chunked(x_BTD), merged(x_BTD))
    assert set(seen[:-1]) == {(4, 8, 3)}  # of 2 x 2 devices: 2 rows, 4 positions
    assert not any(f" {kind}" in program.as_text() for kind in ("all-to-all", "all-gather", "collective-permute"))
