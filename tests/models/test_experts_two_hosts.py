"""Experts on two real processes of two devices each: rows travel between processes, and all is as on one device."""

from __future__ import annotations

import json

import jax
import numpy as np

from glmv_jax.parallel import multihost
from tests.hosts import together

SIZES, PRESET, ROUTING = {"fsdp": 2, "expert": 2}, "fsdp_expert", "skewed"


def one_host(host: int, port: int, folder: str) -> None:
    """The program of a process."""
    jax.config.update("jax_num_cpu_devices", 2)
    multihost.start(f"localhost:{port}", 2, host)
    from glmv_jax.parallel import rules as rules_lib
    from glmv_jax.parallel.mesh import make_mesh
    from tests.models import test_experts as lib

    def put(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda part: np.asarray(x)[part])

    params, axes, *rows = jax.device_get(lib.inputs()[:2]) + lib.inputs()[2:]
    # Neighbours along `expert` are of different processes.
    mesh = make_mesh(SIZES, np.array(jax.devices()).reshape(2, 2).T.ravel().tolist())
    rules = rules_lib.preset(PRESET)
    params = jax.tree.map(put, lib.biased(params, ROUTING), rules.shardings(mesh, axes, params))
    rows = [put(x, rules_lib.batch_sharding(mesh)) for x in rows]
    with rules_lib.use(mesh, rules):
        (loss, (_, aux)), (grads, _) = lib.results()(params, *rows)
    norms = {name: float(jax.numpy.linalg.norm(grads[name])) for name in ("gate", "up", "down", "router")}
    with open(f"{folder}/{host}.json", "w", encoding="utf-8") as file:
        load = jax.device_get(aux["load"].addressable_shards[0].data).tolist()
        json.dump({"loss": float(loss), "load": load, **norms}, file)


def test_two_hosts_are_as_one_device(tmp_path):
    from tests.models import test_experts as lib

    together("tests.models.test_experts_two_hosts.one_host", tmp_path)
    both = [json.loads((tmp_path / f"{host}.json").read_text()) for host in range(2)]
    assert both[0] == both[1]
    (loss, (_, aux)), (grads, _) = lib.alone(ROUTING)
    np.testing.assert_allclose(both[0]["loss"], loss, rtol=1e-5)
    np.testing.assert_array_equal(both[0]["load"], aux["load"])
    for name in ("gate", "up", "down", "router"):
        np.testing.assert_allclose(both[0][name], np.linalg.norm(grads[name]), rtol=1e-5)
