"""Stage 5 on two real processes of two devices each: each asks questions of its own with weights that are split over
both, and the updates are those of one process that has all rows.

Not covered: accelerators, where a copy of the weights is gathered on each process' first device, and episodes.
"""

from __future__ import annotations

import functools
import json
import zlib

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.parallel import multihost
from glmv_jax.rl import Grade
from glmv_jax.train import loop, main
from glmv_jax.train import state as state_lib
from glmv_jax.train.step import make_train_step
from glmv_jax.typing import UserError
from tests.hosts import together
from tests.random_params import switched_on

STEPS = 2
SETTINGS = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.prompts=4", "rollout.group=4",
            "rollout.rows=(4,)", "rollout.max_new_tokens=6", "rollout.proximal=true", "data.ahead=0", "mesh.data=2",
            "rules=fsdp", "optim.lr=1e-2", "optim.clip=0.0"]  # fmt: skip


def stage(folder, *more: str):
    cfg = config.override(config.load("experiments/rl_grpo.py:size=nano"), [*SETTINGS, *more])
    with cfg.unlocked():
        cfg.mesh.fsdp = 2
    cfg.faults = f"{folder}/faults.jsonl"
    made = main.stage_class("rl")(cfg)
    made.verifiers = dict.fromkeys(made.names, lambda text, sample: Grade(zlib.crc32(text.encode()) / 2**32, False, {}))
    fresh = made.init_params
    made.init_params = lambda key: switched_on(fresh(key))
    return made


def trained(made, next_batch) -> list[dict[str, float]]:
    """What the updates say on these batches of own rows, from the same start."""
    placement, optimizer, trainable = loop.prepare(made)
    made.begin(placement, {}, {}, fresh=True)
    step = make_train_step(made, optimizer, placement, trainable=trainable)
    state, said = state_lib.init_state(made, optimizer, placement, made.cfg.seed), []
    for n in range(STEPS):
        batch = {name: x for name, x in next_batch(n, state).items() if name not in made.host_only}
        state, metrics = step(state, {}, placement.batch(batch))
        names = ("loss", "grad_norm", "mismatch_gap_max", "ratio_max", "approx_kl")
        said.append({name: float(metrics[name]) for name in names})
    return said


def one_host(host: int, port: int, folder: str) -> None:
    """The program of a process."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)  # compiled sooner
    multihost.start(f"localhost:{port}", 2, host)
    made = stage(folder)
    data = made.train_data()

    def draw(n, state):
        batch, _ = made.next_batch(data, state)
        kept = {name: multihost.own_rows(x) for name, x in batch.items()}
        np.savez(f"{folder}/{host}-{n}.npz", **kept)
        return batch

    try:
        said = trained(made, draw)
    finally:
        data.close()
    refused = []
    for more in ("rollout.pipeline=async", "rollout.dynamic=true", "rollout.curriculum.on=true", "rollout.rows=(2,4)"):
        with pytest.raises(UserError, match="^2 processes: ") as error:
            stage(folder, more)
        refused.append(str(error.value))
    with open(f"{folder}/{host}.json", "w", encoding="utf-8") as file:
        json.dump([said, made.data_seed, refused], file)


def test_two_hosts_ask_their_own_questions_and_train_as_one(tmp_path):
    together("tests.train.test_rl_two_hosts.one_host", tmp_path)

    (said, seed, refused), (other, other_seed, _) = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    assert said == other and seed != other_seed and len(set(refused)) == 2
    parts = [[dict(np.load(tmp_path / f"{host}-{n}.npz")) for host in range(2)] for n in range(STEPS)]
    for first, second in parts:
        assert not np.array_equal(first["tokens"], second["tokens"])
        for rows in (first, second):
            on = rows["loss_weight"] > 0
            assert on.sum() > 20 and (rows["advantage"][on] != 0).any()
            # Drawn on one device with a copy of the weights, found again by all with their parts of them.
            np.testing.assert_allclose(rows["proximal"][on], rows["old_logprob"][on], atol=1e-4)
    rows = [row for row in map(json.loads, (tmp_path / "samples.jsonl").open()) if row["kind"] == "sample"]
    assert len(rows) == STEPS * 16 and sum("trained_logprobs" in row for row in rows) > 16, "of the first process"

    four = jax.devices()[:4]
    joined = [{name: np.concatenate([part[name] for part in both]) for name in both[0]} for both in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", functools.partial(lambda *_: four))
        alone = trained(stage(tmp_path), lambda n, state: joined[n])
    for here, there in zip(said, alone):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
    assert said[0]["mismatch_gap_max"] < 1e-4 and said[0]["grad_norm"] > 1e-3
