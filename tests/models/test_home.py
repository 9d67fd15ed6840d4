"""Visual tokens to the devices that have their text: against NumPy on emulated devices, and what is compiled for TPUs.

Whole steps are tests/train/test_dispatching.py's, two processes tests/train/test_two_hosts.py's. That what TPUs send
arrives as it does here is not covered.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glmv_jax.kernels import exchange as lib
from glmv_jax.kernels.exchange import Way, exchange
from glmv_jax.models.home import home, ways
from glmv_jax.parallel import dispatch
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import make_mesh

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
D, PLACES = 3, 5


def drawn(devices: int, tokens: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """x [V, M, D] and sent [V, M]: what a device is sent lies there in the order of those that sent it."""
    rng = np.random.default_rng(devices)
    to = rng.integers(-1, devices, 2 * devices * tokens)
    to[rng.random(len(to)) < 0.2] = 0  # more than the first has room for
    sent, filled = np.full(len(to), -1), np.zeros(devices, int)
    for n, device in enumerate(to):
        if device >= 0 and filled[device] < PLACES:
            sent[n] = device * PLACES + filled[device]
            filled[device] += 1
    assert filled.max() == PLACES and (devices == 1 or filled.min() < PLACES) and (sent < 0).sum() > devices
    return rng.normal(size=(2 * devices, tokens, D)).astype(np.float32), sent.reshape(2 * devices, tokens)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 4}, {"data": 2, "context": 2, "tensor": 2}], ids=str)
@needs_8
def test_tokens_arrive_and_their_gradients_come_back(sizes, monkeypatch):
    """Over data and fsdp as on TPUs, where rows that nobody put are what memory held: here NaN."""

    def ragged(x_RD, there, back, axis, rows, home):
        got_RD = lib.padded(x_RD, there, axis, rows, len(x_RD))
        return jnp.where(lib.put(back, rows)[:, None], got_RD, 0 if home else jnp.nan)

    monkeypatch.setattr(lib, "supported", lambda: "fsdp" in sizes)
    monkeypatch.setattr(lib, "ragged", ragged)
    devices = int(np.prod(list(sizes.values())))
    x, sent = drawn(devices) if sizes else drawn(1, 8)
    want = np.zeros((devices * PLACES, D), np.float32)
    want[sent[sent >= 0]] = x[sent >= 0]
    weight = np.random.default_rng(9).normal(size=want.shape).astype(np.float32)
    back = np.where(sent[..., None] >= 0, weight[sent], 0)

    def both(x):
        got, pull = jax.vjp(lambda x: home(x, sent, PLACES), x)
        return got, pull(weight.reshape(got.shape))[0]

    if not sizes:
        got, grads = jax.jit(both)(x)
    else:
        mesh = make_mesh(sizes)
        with rules_lib.use(mesh, rules_lib.preset("fsdp_context_tensor")):
            got, grads = jax.jit(both)(jax.device_put(x, dispatch.sharding(mesh, len(x))))
        assert got.shape == (sizes["data"] * sizes.get("fsdp", 1), devices * PLACES // len(got), D)
    np.testing.assert_array_equal(got.reshape(-1, D), want)
    np.testing.assert_array_equal(grads, back)


@needs_8
def test_processes_exchange_among_themselves():
    """Groups of four of eight devices, as two processes would be: nothing leaves a group."""
    mesh = make_mesh({"data": 4, "tensor": 2})
    way = Way(dispatch.over(mesh), ((0, 1, 4, 5), (2, 3, 6, 7)))
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (2, 4, 4)).astype(np.int32)
    x = rng.normal(size=(8, 12, 2)).astype(np.float32)
    table = np.zeros((8, 4, 4), np.int32)
    for group, numbers in enumerate(way.groups):
        table[list(numbers)] = counts[group]
    local = lambda x, table: exchange(x[0], *ways(table[0], way.me()), way, 16, 12, True)[None]  # noqa: E731
    where = P(way.axes)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(where, where), out_specs=where, check_vma=False))
    got = run(jnp.array(x), jnp.array(table))
    for group, numbers in enumerate(way.groups):
        for me, device in enumerate(numbers):
            ends = counts[group].cumsum(1)
            parts = [x[s][ends[i, me] - counts[group, i, me] : ends[i, me]] for i, s in enumerate(numbers)]
            want = np.concatenate(parts)
            np.testing.assert_array_equal(got[device, : len(want)], want)
            assert not np.any(got[device, len(want) :])


# --- TPU, compiled ----------------------------------------------------------------------------------------------------

TPU = """
import re, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from glmv_jax.models.home import home
from glmv_jax.parallel import dispatch, rules
from glmv_jax.parallel.compiler import SETS
from glmv_jax.parallel.mesh import make_mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = make_mesh({"data": 2, "fsdp": 4}, devices)
rows, everywhere = NamedSharding(mesh, P(dispatch.over(mesh))), NamedSharding(mesh, P())
shape = lambda s, d, at: jax.ShapeDtypeStruct(s, d, sharding=at)
def loss(weight, other, features, sent, text):
    back = home(features @ weight, sent, 256)
    words = jax.nn.relu(text @ other) @ other.T  # what does not depend on images
    return (back.astype(jnp.float32) ** 2).sum() + (words.astype(jnp.float32) ** 2).sum()
args = (shape((512, 256), jnp.bfloat16, everywhere), shape((1024, 4096), jnp.bfloat16, everywhere),
        shape((16, 128, 512), jnp.bfloat16, rows), shape((16, 128), jnp.int32, rows),
        shape((8 * 4096, 1024), jnp.bfloat16, rows))
with rules.use(mesh, rules.preset("fsdp")):
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args)
hlo = lowered.compile(compiler_options=SETS["async"]).as_text()
for name in ("ragged-all-to-all-start", "ragged-all-to-all", "all-gather", "all-to-all"):
    print(name, len(re.findall(rf" {name}\\(", hlo)))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'glmv_jax[tpu]'")
def test_on_tpus_they_are_sent_as_they_are_while_others_compute():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
           "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", TPU], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: int(n) for name, n in (line.split() for line in done.stdout.splitlines()[-4:])}
    # Tokens there, their gradient back; and beforehand how many there are, a few numbers.
    assert found["ragged-all-to-all-start"] == 2 and found["ragged-all-to-all"] == found["all-to-all"] == 0
    assert found["all-gather"] <= 1, found
