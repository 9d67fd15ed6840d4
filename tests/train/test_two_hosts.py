"""Stage 2 on two real processes of two devices each: a batch is of both, its length the same for both, and the steps
are those of one process that has all rows.

Not covered: a whole run of several processes (checkpoints, evaluation), and networks slower than this machine.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.train import loop, main
from glmv_jax.train import state as state_lib
from glmv_jax.train.step import make_train_step
from tests.hosts import together

STEPS = 3
SETTINGS = ["batch=16", "model.vision.depth=1", "data.lengths=(16, 32)", "data.length_shares=(1.0, 1.0)",
            "data.both_languages=False", "mesh.data=2", "rules=fsdp", "loss.impl=ring_bidir", "loss.chunk=4",
            "optim.clip=0.0"]  # fmt: skip


def trained(next_batch) -> list[float]:
    """Losses of the steps on these batches of own rows, from the same start."""
    cfg = config.override(config.load("experiments/cogvit_siglip.py:size=nano"), SETTINGS)
    with cfg.unlocked():
        cfg.mesh.fsdp = 2
    stage = main.stage_class("siglip")(cfg)
    data, losses = stage.train_data(), []
    placement, optimizer, trainable = loop.prepare(stage)
    step = make_train_step(stage, optimizer, placement, trainable=trainable)
    state = state_lib.init_state(stage, optimizer, placement, cfg.seed)
    for n in range(STEPS):
        state, metrics = step(state, {}, placement.batch(next_batch(data, n)))
        losses.append(float(metrics["loss"]))
    data.close()
    return losses


def one_host(host: int, port: int, folder: str) -> None:
    """The program of a process."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, host)

    def read(data, n):
        batch = next(data)
        np.savez(f"{folder}/{host}-{n}.npz", **batch)
        return batch

    with open(f"{folder}/{host}.json", "w", encoding="utf-8") as file:
        json.dump(trained(read), file)


def test_two_hosts_train_as_one(tmp_path):
    together("tests.train.test_two_hosts.one_host", tmp_path)

    parts = [[dict(np.load(tmp_path / f"{host}-{n}.npz")) for host in range(2)] for n in range(STEPS)]
    for first, second in parts:
        assert len(first["tokens"]) == len(second["tokens"]) == 8
        assert first["frame"].shape == second["frame"].shape
        assert not set(first["concept"][first["concept"] < 1653]) & set(second["concept"][second["concept"] < 1653])
    both = [json.loads((tmp_path / f"{host}.json").read_text()) for host in range(2)]
    assert both[0] == both[1]
    four = jax.devices()[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: four)
        alone = trained(lambda _, n: {name: np.concatenate([part[name] for part in parts[n]]) for name in parts[n][0]})
    np.testing.assert_allclose(both[0], alone, rtol=1e-5)
